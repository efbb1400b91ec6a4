"""Chats as a model was taught them: its template, and which of the tokens are the assistant's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tink.domain.requests import Request
from tink.errors import UserError
from tink.pretrained import Text

# Texts of the tokenizer's that templates write.
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


class Message(Request, frozen=True, forbid_unknown_fields=True):
    role: str
    content: str


class Taught(NamedTuple):
    """A conversation's tokens, and which of them the assistant said."""

    tokens: list[int]
    assistant: list[bool]


class Template:
    """A chat template, in Jinja as Hugging Face's tokenizers have it. It comes with the model, and is run
    in a sandbox as there."""

    def __init__(self, source: str | None, named: dict[str, str]) -> None:
        self._source, self._named = source, named
        self._compiled: Any = None

    @classmethod
    def load(cls, directory: Path) -> Template:
        """Blocks. A directory without a template gives one that refuses."""
        config: dict[str, Any] = {}
        if (file := directory / "tokenizer_config.json").is_file():
            config = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
        source = config.get("chat_template")
        if (file := directory / "chat_template.jinja").is_file():
            source = file.read_text()
        # A token is written as its text, or as an object with it.
        tokens = {name: config.get(name) for name in _NAMED}
        named = {n: t.get("content", "") if isinstance(t, dict) else t for n, t in tokens.items() if t}
        return cls(source if isinstance(source, str) else None, named)

    def prompt(self, chat: list[Message]) -> str:
        """Up to where the assistant's answer begins."""
        return self._render(chat, answer=True)

    def teach(self, chat: list[Message], text: Text) -> Taught:
        """UserError for one in which the assistant says nothing, or whose earlier turns are written
        differently once later ones are there: then no part of it is what was said at that time."""
        whole = self._render(chat, answer=False)
        spans = []
        for number, message in enumerate(chat):
            if message.role == "assistant":
                before = self._render(chat[:number], answer=True)
                after = self._render(chat[: number + 1], answer=False)
                if not (whole.startswith(after) and after.startswith(before)):
                    raise UserError(
                        "the model's chat template writes earlier turns of this chat differently once "
                        "later ones are there: send it as datums, or a chat with one answer at its end"
                    )
                spans.append((len(before), len(after)))
        if not spans:
            raise UserError("a chat to train on needs a message of the assistant: its turns are the target")
        tokens, places = text.encode_places(whole)
        assistant = [
            any(begin <= at and until <= end for begin, end in spans) and at < until for at, until in places
        ]
        return Taught(tokens, assistant)

    def _render(self, chat: list[Message], *, answer: bool) -> str:
        if self._source is None:
            raise UserError("the model has no chat template: send tokens or a prompt, not messages")
        import jinja2

        try:
            if self._compiled is None:
                self._compiled = _environment().from_string(self._source)
            written = self._compiled.render(
                messages=[msgspec.structs.asdict(message) for message in chat],
                add_generation_prompt=answer,
                **self._named,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UserError(f"the model's chat template does not take these messages: {error}") from error
        return str(written)


def _environment() -> Any:
    import jinja2.ext
    import jinja2.sandbox

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = lambda value: msgspec.json.encode(value).decode()
    return environment


def _refuse(reason: str) -> None:
    import jinja2

    raise jinja2.TemplateError(reason)
