"""What the training server needs of an engine.

Every method is called off the Trio thread; those of one model never at the same time, those of
different models and `sample` in any combination. A method that raises has changed nothing: a TinkError
says what was wrong with the request (UserError) or with this server; anything else is a bug or want of
memory, and is reported as the server's. One that takes long says `progress.beat()` now and then: without
it a worker takes it for hung, in the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tink.wire.samples import Sampled
from tink.wire.tink_train import (
    CreateModel,
    ExportAdapter,
    File,
    Forward,
    ForwardBackward,
    LoadState,
    ModelInfo,
    OpResult,
    OptimStep,
    SampleRequest,
    SaveState,
)


@dataclass(frozen=True)
class Facts:
    """The engine's part of `Info`, where each is explained."""

    engine: str
    versions: dict[str, str]
    base_model: str
    base_path: str | None
    base_digest: str
    arch: str
    parameters: int
    vocab_size: int
    max_context: int
    max_rank: int
    losses: list[str]
    capabilities: list[str]


class Engine(Protocol):
    @property
    def facts(self) -> Facts: ...

    def create(self, model_id: str, op: CreateModel) -> ModelInfo: ...

    def forward(self, model_id: str, op: Forward) -> OpResult: ...

    def forward_backward(self, model_id: str, op: ForwardBackward) -> OpResult: ...

    def optim_step(self, model_id: str, op: OptimStep) -> dict[str, float]:
        """Metrics."""

    def save_state(self, model_id: str, op: SaveState, origin: str) -> list[File]:
        """`origin` names the operation, so that its redo finds what it published the first time."""

    def load_state(self, model_id: str, op: LoadState) -> None: ...

    def export_adapter(self, model_id: str, op: ExportAdapter, origin: str) -> list[File]: ...

    def remove(self, model_id: str) -> None: ...

    def snapshot(self, model_id: str, path: str, book: bytes, origin: str) -> list[File]:
        """All of the model's state, and `book`: what the server must know of its operations."""

    def read_book(self, path: str) -> bytes:
        """The `book` of a snapshot, whose files have been verified."""

    def restore(self, model_id: str, path: str) -> None:
        """Puts a snapshot in the place of the model, if there is one."""

    def sample(self, request: SampleRequest) -> Sampled: ...
