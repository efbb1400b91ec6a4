"""One engine on several processes, each of which has a slice of the base model: they do the same calls in
the same order, since each layer needs all of them.

The first rank is the server's, and leads: it tells the others what it is about to do. After each call all
compare how it ended, to the last bit of the result: a TinkError has changed nothing anywhere, and is
raised here. Anything else that one of them raises ends its process, whose connections break, and so all of
them: nobody waits in a collective for one who has left it, and no two go on with different weights.
Whoever started them starts them again, and the worker restores.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, Protocol, TypeVar, get_type_hints

import msgspec
import structlog
import torch
import torch.distributed as dist

from tink.errors import TinkError
from tink.limits import DIGEST_BYTES, RANK_IDLE_SECONDS, TURN_BEAT_SECONDS
from tink.trainer.engines.interface import Engine, Facts
from tink.trainer.progress import beat
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

T = TypeVar("T")

log = structlog.get_logger("tink.trainer")


class Lock(Protocol):
    def acquire(self, *, timeout: float) -> bool: ...

    def release(self) -> None: ...


def gather() -> Any:
    """The group in which the ranks are told what to do. Every rank calls this once."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=RANK_IDLE_SECONDS))


class Leader:
    """The first rank's engine and, through it, everybody's. One call at a time. What only reads a model is
    done here alone: an adapter is whole on every rank, and files are written once."""

    def __init__(self, engine: Engine, group: Any, lock: Lock) -> None:
        self._engine, self._group, self._lock = engine, group, lock

    @property
    def facts(self) -> Facts:
        return self._engine.facts

    def create(self, model_id: str, op: CreateModel) -> ModelInfo:
        return self._together(self._engine.create, model_id, op)

    def forward(self, model_id: str, op: Forward) -> OpResult:
        return self._together(self._engine.forward, model_id, op)

    def forward_backward(self, model_id: str, op: ForwardBackward) -> OpResult:
        return self._together(self._engine.forward_backward, model_id, op)

    def optim_step(self, model_id: str, op: OptimStep) -> dict[str, float]:
        return self._together(self._engine.optim_step, model_id, op)

    def save_state(self, model_id: str, op: SaveState, origin: str) -> list[File]:
        return self._engine.save_state(model_id, op, origin)

    def load_state(self, model_id: str, op: LoadState) -> None:
        self._together(self._engine.load_state, model_id, op)

    def export_adapter(self, model_id: str, op: ExportAdapter, origin: str) -> list[File]:
        return self._engine.export_adapter(model_id, op, origin)

    def remove(self, model_id: str) -> None:
        self._together(self._engine.remove, model_id)

    def snapshot(self, model_id: str, path: str, book: bytes, origin: str) -> list[File]:
        return self._engine.snapshot(model_id, path, book, origin)

    def read_book(self, path: str) -> bytes:
        return self._engine.read_book(path)

    def restore(self, model_id: str, path: str) -> None:
        self._together(self._engine.restore, model_id, path)

    def sample(self, request: SampleRequest) -> Sampled:
        return self._together(self._engine.sample, request)

    def _together(self, method: Callable[..., T], *args: Any) -> T:
        while not self._lock.acquire(timeout=TURN_BEAT_SECONDS):
            beat()
        try:
            with to_the_end():
                _tell(self._group, msgspec.msgpack.encode((method.__name__, args)))
                outcome = _perform(method, args)
                digests = _gather(outcome.digest)
            if len(set(digests)) > 1:
                _end("the ranks disagree", method=method.__name__, digests=digests)
        finally:
            self._lock.release()
        if outcome.failure is not None:
            raise outcome.failure
        result: T = outcome.result
        return result


def follow(engine: Engine, group: Any) -> NoReturn:
    """Does what the leader does, and ends the process when it is gone."""
    while True:
        try:
            told = _hear(group)
        except RuntimeError as error:  # gloo's, when a connection breaks
            log.info("the first rank is gone", reason=str(error).strip().partition("\n")[0])
            leave(0)
        with to_the_end():
            name, args = _understand(told)
            # Whether this was what all others have found is the leader's to tell, and to end.
            _gather(_perform(getattr(engine, name), args).digest)


@dataclass(frozen=True)
class _Outcome:
    """`digest`: of the result, or what the user is told instead of one."""

    digest: str
    result: Any = None
    failure: TinkError | None = None


def _perform(method: Callable[..., Any], args: tuple[Any, ...]) -> _Outcome:
    try:
        result = method(*args)
    except TinkError as error:
        return _Outcome(repr(error), failure=error)
    return _Outcome(hashlib.sha256(msgspec.msgpack.encode(result)).hexdigest(), result)


# -- messages -----------------------------------------------------------------------------------------


def _tell(group: Any, message: bytes) -> None:
    dist.broadcast(torch.tensor([len(message)]), src=0, group=group)
    dist.broadcast(_tensor(message), src=0, group=group)


def _hear(group: Any) -> bytes:
    length = torch.zeros(1, dtype=torch.int64)
    dist.broadcast(length, src=0, group=group)
    message = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(message, src=0, group=group)
    return bytes(message.numpy())


def _understand(message: bytes) -> tuple[str, tuple[Any, ...]]:
    """A method of the leader's, and its arguments."""
    name, encoded = msgspec.msgpack.decode(message, type=tuple[str, msgspec.Raw])
    *kinds, _ = get_type_hints(getattr(Leader, name)).values()
    arguments: Any = tuple.__class_getitem__(tuple(kinds))
    return name, msgspec.msgpack.decode(encoded, type=arguments)


def _gather(digest: str) -> list[str]:
    """Those of all ranks, on the first one."""
    mine = _tensor(digest.encode()[:DIGEST_BYTES].ljust(DIGEST_BYTES, b"\0"))
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather(mine, found, dst=0)
    return [one.numpy().tobytes().rstrip(b"\0").decode(errors="replace") for one in found or ()]


def _tensor(data: bytes) -> Any:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


# -- the end ------------------------------------------------------------------------------------------


@contextmanager
def to_the_end() -> Iterator[None]:
    """Whatever is raised within it ends the process."""
    try:
        yield
    except BaseException as error:
        _end("a rank has failed", exc_info=error)


def _end(event: str, **fields: Any) -> NoReturn:
    log.error(event, rank=dist.get_rank() if dist.is_initialized() else None, **fields)
    leave(1)


def leave(status: int) -> NoReturn:
    """Ends the process of a rank. Not an orderly exit, in which gloo's threads sometimes abort: others may
    wait in collectives, a connection may break meanwhile, and nothing here is worth keeping."""
    os._exit(status)
