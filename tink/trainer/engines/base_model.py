"""What an engine needs of a base model: the frozen weights below every adapter, however they are held and
on however many processes. An adapter in use (lora.using) takes part in `hidden`, and in what the head makes
of it.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers

from tink.errors import StartupError
from tink.trainer.engines import lora
from tink.trainer.engines.head import Head

Tensor = Any


@dataclass(frozen=True, kw_only=True)
class BaseModel(ABC):
    """`digest` identifies weights and architecture. `sites` are the layers that an adapter may have, by
    the names that they have in transformers; `eos` the ids that end a sequence; `versions` those of the
    libraries, and whatever else a bit-exact redo must find unchanged. `in_flight`: micro-batches that it
    works on at once."""

    engine: ClassVar[str]

    name: str
    path: Path
    digest: str
    arch: str
    sites: lora.Sites
    head: Head
    tokenizer: Any
    eos: frozenset[int]
    vocab_size: int
    context: int
    parameters: int
    versions: dict[str, str]
    in_flight: int = 1

    @property
    def device(self) -> Any:
        return self.sites.device

    @abstractmethod
    def hidden(self, ids: Tensor, cache: Any = None) -> Tensor:
        """ids (B, S) -> (B, S, H). No mask: rows are padded on the right or not at all, where a causal
        model cannot see it. With a cache, the ids go behind what it has, and are added to it."""

    def hiddens(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """`hidden` of each, of a few micro-batches that may be worked on at once."""
        return [self.hidden(ids) for ids in batches]

    def total(self, gradient: Tensor) -> Tensor:
        """The gradient of an adapter, of which each process that holds a part of the model has a part."""
        return gradient

    def new_cache(self) -> Any:
        """Keys and values of a prompt, for `hidden`."""
        return transformers.DynamicCache()


def device() -> Any:
    """Where a model is put: on the GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype(name: str | None) -> Any:
    """The one of that name, or else what suits the device."""
    return getattr(torch, name or ("float32" if device().type == "cpu" else "bfloat16"))


def require_determinism() -> None:
    """For this process: an operation without a deterministic kernel raises. What
    torch.use_deterministic_algorithms does, without its import of the compiler (seconds)."""
    # cuBLAS reads it when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_deterministic_debug_mode("error")
    # Nothing here reads memory that was not written.
    torch.utils.deterministic.fill_uninitialized_memory = False


@contextmanager
def reading(directory: Path) -> Iterator[None]:
    """StartupError for whatever a library raises over a model's files, for which they have all kinds of
    exceptions."""
    try:
        yield
    except StartupError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise StartupError(f"{directory} is no model that can be loaded: {reason}") from error


def digest(directory: Path) -> str:
    """sha256 over the names and hashes of the files with weights and architecture."""
    whole = hashlib.sha256()
    for file in sorted([*directory.glob("*.safetensors"), directory / "config.json"]):
        with file.open("rb") as stream:
            part = hashlib.file_digest(stream, "sha256").hexdigest()
        whole.update(f"{file.name} {part}\n".encode())
    return whole.hexdigest()
