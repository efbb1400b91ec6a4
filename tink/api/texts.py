"""The served model's text side, for requests that have text: loaded when the first one comes."""

from __future__ import annotations

import trio

from tink import pretrained
from tink.api.chat import Template
from tink.errors import StartupError, UserError
from tink.limits import TEXT_RETRY_SECONDS
from tink.pretrained import Text
from tink.world import World


class Texts:
    """A base model's tokenizer and chat template, by their directory or the model's name on the hub."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._loading = trio.Lock()
        self._loaded: dict[str, tuple[Text, Template]] = {}
        # Why, and until when that is believed: a hub that does not answer takes its time.
        self._failed: dict[str, tuple[str, float]] = {}

    async def of(self, model: str | None) -> tuple[Text, Template]:
        """UserError where the worker cannot have them: text needs them, tokens do not."""
        if model is None:
            raise UserError("this server has no tokenizer of its model: send tokens, not text")
        async with self._loading:
            reason, until = self._failed.get(model, ("", 0.0))
            if model not in self._loaded and self._world.monotonic() >= until:
                try:
                    self._loaded[model] = await self._world.run_sync(_load, model)
                except StartupError as error:
                    reason = str(error)
                    self._failed[model] = reason, self._world.monotonic() + TEXT_RETRY_SECONDS
            if model not in self._loaded:
                raise UserError(f"text cannot be read here: {reason}; send tokens instead")
            return self._loaded[model]


def _load(model: str) -> tuple[Text, Template]:
    directory = pretrained.find(model, pretrained.TEXT_FILES)
    return Text.load(directory), Template.load(directory)
