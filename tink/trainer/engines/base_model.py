"""What an engine needs of a base model: the frozen weights below every adapter, however they are held and
on however many processes. An adapter in use (lora.using) takes part in `hidden`, `logits` and `score`.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch.utils.checkpoint import checkpoint

from tink.errors import StartupError
from tink.limits import LOGIT_CELLS
from tink.trainer.engines import lora

Tensor = Any


@dataclass(frozen=True, kw_only=True)
class BaseModel(ABC):
    """`digest` identifies weights and architecture. `sites` are the layers that an adapter may have, by
    the names that they have in transformers; `eos` the ids that end a sequence; `versions` those of the
    libraries, and whatever else a bit-exact redo must find unchanged."""

    engine: ClassVar[str]

    name: str
    path: Path
    device: Any
    digest: str
    arch: str
    sites: lora.Sites
    tokenizer: Any
    eos: frozenset[int]
    vocab_size: int
    context: int
    parameters: int
    versions: dict[str, str]

    @abstractmethod
    def hidden(self, ids: Tensor, cache: Any = None) -> Tensor:
        """ids (B, S) -> (B, S, H). No mask: rows are padded on the right or not at all, where a causal
        model cannot see it. With a cache, the ids go behind what it has, and are added to it."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> float32 (..., V)."""

    @abstractmethod
    def score(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden (T, H), targets (T, K) -> log p(target), float32 (T, K)."""

    def total(self, gradient: Tensor) -> Tensor:
        """The gradient of an adapter, of which each process that holds a part of the model has a part."""
        return gradient

    def new_cache(self) -> Any:
        """Keys and values of a prompt, for `hidden`."""
        return transformers.DynamicCache()

    @property
    def rows(self) -> int:
        """Positions whose logits may be held at once."""
        return max(LOGIT_CELLS // self.vocab_size, 1)

    def logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """`score`, of any number of positions. K targets of one position share its row of logits. Logits
        are made a few rows at a time, and again in the backward pass, since a whole batch of them would be
        the largest thing in memory by far."""
        if len(hidden) <= self.rows:
            return self.score(hidden, targets)
        pieces = zip(hidden.split(self.rows), targets.split(self.rows), strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([self.score(*piece) for piece in pieces])
        score = lora.bound(self.score)
        return torch.cat(
            [checkpoint(score, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
        )


def device() -> Any:
    """Where a model is put: on the GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def require_determinism() -> None:
    """For this process: an operation without a deterministic kernel raises. What
    torch.use_deterministic_algorithms does, without its import of the compiler (seconds)."""
    # cuBLAS reads it when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_deterministic_debug_mode("error")
    # Nothing here reads memory that was not written.
    torch.utils.deterministic.fill_uninitialized_memory = False


def unloadable(directory: Path, error: Exception) -> StartupError:
    return StartupError(f"{directory} is no model that can be loaded: {error}")


def eos(*sources: int | list[int] | None) -> frozenset[int]:
    """The first that says anything."""
    for source in sources:
        if source is not None:
            return frozenset([source] if isinstance(source, int) else source)
    return frozenset()


def digest(directory: Path) -> str:
    """sha256 over the names and hashes of the files with weights and architecture."""
    whole = hashlib.sha256()
    for file in sorted([*directory.glob("*.safetensors"), directory / "config.json"]):
        with file.open("rb") as stream:
            part = hashlib.file_digest(stream, "sha256").hexdigest()
        whole.update(f"{file.name} {part}\n".encode())
    return whole.hexdigest()
