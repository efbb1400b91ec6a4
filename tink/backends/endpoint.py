"""Where a training server is, and how it is spoken to: as `tink trainer`, or, where somebody else starts
it, perhaps as a plain Megatron-LM text generation server, which only samples."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import trio

from tink.backends import text_generation
from tink.backends.trainer import TrainerClient
from tink.errors import StartupError
from tink.world import World


@dataclass(frozen=True)
class Endpoint:
    url: str
    token: str = ""

    def connect(self, world: World, slots: int) -> AbstractAsyncContextManager[TrainerClient]:
        return TrainerClient.connect(self.url, world, slots=slots, token=self.token)


@dataclass(frozen=True, kw_only=True)
class ExternalEndpoint(Endpoint):
    """Of a server that somebody else starts, watches and ends. `model`: a directory or hub name, of which a
    plain one's tokenizer is; clients call it `name`."""

    model: str = ""
    name: str = ""

    @asynccontextmanager
    async def connect(self, world: World, slots: int) -> AsyncIterator[TrainerClient]:
        """StartupError if a plain one is there, and not known of which model."""
        if not await text_generation.recognised(self.url, world):
            async with super().connect(world, slots) as client:
                yield client
            return
        if not self.model:
            raise StartupError(
                f"the server at {self.url} is a plain {text_generation.ENGINE}, which takes text: set "
                "TINK_HF_MODEL to its model (a directory or hub name), for the tokenizer"
            )
        text = await world.run_sync(text_generation.load, self.model)
        async with text_generation.connect(
            self.url, world, slots=slots, text=text, name=self.name or self.model
        ) as client:
            yield client

    async def find(self, unfit: str | None = None) -> Endpoint:
        """Here, running or not. A server that is `unfit` is whoever's who started it to end: it is not used
        until another one answers here."""
        await trio.lowlevel.checkpoint()
        return self
