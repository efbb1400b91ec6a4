"""A pretrained model's directory: where it is, and its text side. No weights, and no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from tink.errors import UNREADABLE, StartupError, UserError
from tink.home import Home
from tink.limits import MAX_PIECE_TOKENS

T = TypeVar("T")

# The model that Tink builds itself (tink/trainer/tiny.py).
BUILT_IN = "tink/qwen3-tiny"
# What of a hub's repository tells of a model without its weights.
TEXT_FILES = ("*.json", "*.jinja")
# What a decoder shows for bytes that are no character, or not yet one.
INCOMPLETE = "\ufffd"


def built_in(home: Path) -> Path:
    """Where the built-in model is, once it has been built."""
    return Home(home).models / BUILT_IN.replace("/", "--")


def find(model: str, patterns: Iterable[str]) -> Path:
    """A directory, or what the Hugging Face hub has under that name (from its cache when offline). Takes as
    long as a download; StartupError if there is no such model."""
    directory = Path(model)
    if directory.is_dir():
        return directory.resolve()
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise _lacks(error) from error
    try:
        return Path(snapshot_download(model, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise StartupError(
            f"there is no model {model}, neither as a directory nor on the hub: {reason}"
        ) from error


class Config(msgspec.Struct, frozen=True):
    """What its config.json says of sequences, where generation_config.json does not say otherwise."""

    model_type: str = ""
    max_position_embeddings: int | None = None
    vocab_size: int | None = None
    eos_token_id: int | list[int] | None = None
    bos_token_id: int | list[int] | None = None

    @classmethod
    def load(cls, directory: Path) -> Config:
        """StartupError if there is none that can be read."""
        config = _read(directory / "config.json", cls)
        generation = directory / "generation_config.json"
        if not generation.is_file():
            return config
        said = _read(generation, _Generation)
        if said.eos_token_id is msgspec.UNSET:
            return config
        return msgspec.structs.replace(config, eos_token_id=said.eos_token_id)

    @property
    def eos(self) -> frozenset[int]:
        """The ids that end a sequence."""
        return frozenset(_ids(self.eos_token_id))


class _Generation(msgspec.Struct, frozen=True):
    eos_token_id: int | list[int] | msgspec.UnsetType | None = msgspec.UNSET


@dataclass(frozen=True, kw_only=True)
class Text:
    """A model's tokenizer, for any number of threads, and what its config says of sequences. `context` is
    in tokens (0: not said). `eos` ends one; `bos` begins one where the caller asks for that; `added` is
    what the tokenizer itself puts before every text."""

    path: Path
    arch: str
    context: int
    vocab_size: int
    eos: frozenset[int]
    bos: int | None
    added: tuple[int, ...]
    _tokenizer: Any = field(repr=False)

    @classmethod
    def load(cls, directory: Path) -> Text:
        """Blocks. StartupError if the directory has no tokenizer.json or config.json that can be read."""
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError as error:
            raise _lacks(error) from error
        config = Config.load(directory)
        try:
            tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
            # Left there by whoever saved it last; transformers sets them anew with each call.
            tokenizer.no_truncation()
            tokenizer.no_padding()
        except Exception as error:  # tokenizers raises no class of its own
            raise StartupError(f"{directory / 'tokenizer.json'} is no tokenizer: {error}") from error
        begins = _ids(config.bos_token_id) or _ids(config.eos_token_id)
        return cls(
            path=directory,
            arch=config.model_type,
            context=config.max_position_embeddings or 0,
            vocab_size=config.vocab_size or tokenizer.get_vocab_size(),
            eos=config.eos,
            bos=begins[0] if begins else None,
            added=tuple(tokenizer.encode("").ids),
            _tokenizer=tokenizer,
        )

    def encode(self, text: str) -> list[int]:
        """With what the tokenizer puts around every text. UserError for a text that is no Unicode."""
        return self._encode(text, whole=True)

    def encode_part(self, text: str) -> list[int]:
        """Without that: of a text that goes on."""
        return self._encode(text, whole=False)

    def _encode(self, text: str, *, whole: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text is no Unicode: {error}") from error
        return list(self._tokenizer.encode(text, add_special_tokens=whole).ids)

    def encode_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Without that, and from where to where in the text each token is."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return list(encoding.ids), list(encoding.offsets)

    def plain(self, tokens: Sequence[int]) -> str:
        """Without special tokens."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def decode(self, tokens: Sequence[int]) -> str:
        """Special tokens by their names."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    def spell(self, tokens: Sequence[int]) -> str:
        """The text that `encode` makes these tokens of. UserError if there is none."""
        wrong = next((token for token in tokens if not 0 <= token < self.vocab_size), None)
        if wrong is not None:
            raise UserError(
                f"the prompt has token id {wrong}; the vocabulary is 0 to {self.vocab_size - 1}"
            )
        begin = len(self.added) if tuple(tokens[: len(self.added)]) == self.added else 0
        text = self.decode(tokens[begin:])
        if self.encode(text) != list(tokens):
            raise UserError(
                f"the prompt's {len(tokens)} tokens are not those of any text: read as text and tokenised "
                f"again ({self.path.name}) they are others"
            )
        return text

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """What each token adds to the text; a character of several tokens is its last one's."""
        pieces: list[str] = []
        begin = told = 0  # so far it was told; a tokenizer may need some of that to read on
        for end in range(1, len(tokens) + 1):
            before, after = self.decode(tokens[begin:told]), self.decode(tokens[begin:end])
            # Else a text of nothing but such signs would be read from its beginning for each of them.
            waits = after.endswith(INCOMPLETE) and end - told < MAX_PIECE_TOKENS
            if waits and end < len(tokens):
                pieces.append("")
                continue
            pieces.append(after[len(before) :])
            begin, told = told, end
        return pieces


def _lacks(error: ModuleNotFoundError) -> StartupError:
    """Who goes by tokens alone does without the extras."""
    return StartupError(f"No module named '{error.name}', which text needs: pip install '.[hf]'")


def _read(file: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except (OSError, *UNREADABLE) as error:
        raise StartupError(f"{file} cannot be read: {error}") from error


def _ids(said: int | list[int] | None) -> list[int]:
    return [] if said is None else [said] if isinstance(said, int) else list(said)
