"""One lane per model: its operations run in the order of their numbers, one at a time, off the Trio
thread; the lanes of different models share `slots`, and take turns.

A lane's task lives in the server's nursery, not in the call that made the operation: a caller that goes
away cancels nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import assert_never
from weakref import WeakValueDictionary

import msgspec
import structlog
import trio

from tink import crash
from tink.limits import MAX_OP_WAIT
from tink.trainer.books import CANCELLED, Book, Books, Outcome
from tink.trainer.boundary import perform
from tink.trainer.engines.interface import Engine
from tink.trainer.progress import Idleness, Work, working
from tink.wire.tink_train import (
    CreateModel,
    ExportAdapter,
    Forward,
    ForwardBackward,
    LoadState,
    OpReply,
    OpRequest,
    OpResult,
    OptimStep,
    RemoveModel,
    RestoreReply,
    RestoreRequest,
    Running,
    SaveState,
    Skip,
    SnapshotReply,
    SnapshotRequest,
    State,
)
from tink.world import World

log = structlog.get_logger("tink.trainer")


class Lanes:
    """Performs what the books allow. All methods raise Refused as the protocol's table says."""

    def __init__(
        self, world: World, engine: Engine, books: Books, slots: int, nursery: trio.Nursery
    ) -> None:
        self._world = world
        self._engine = engine
        self._books = books
        self._nursery = nursery
        self._slots = trio.CapacityLimiter(slots)
        self._idleness = Idleness(world.monotonic)
        self._finishing = False
        self._moving: set[str] = set()
        self._ended: dict[tuple[str, int], trio.Event] = {}
        self._came: dict[tuple[str, int], float] = {}  # those that are queued, by the clock
        self._work: dict[str, Work] = {}
        # A model's lock is there while somebody holds or wants it.
        self._locks: WeakValueDictionary[str, trio.Lock] = WeakValueDictionary()

    async def submit(self, request: OpRequest) -> OpReply:
        """Waits at most `request.wait` seconds; cancelling the wait leaves the operation alone."""
        model_id, op_no = request.model_id, request.op_no
        self._books.admit(request.incarnation, request.lease)
        self._books.ack(model_id, min(request.acked, op_no - 1))
        verdict = self._books.decide(request)
        if verdict == "accept":
            self._books.accept(request)
            self._ended[model_id, op_no] = trio.Event()
            self._came[model_id, op_no] = self._world.monotonic()
            if model_id not in self._moving:
                self._moving.add(model_id)
                self._nursery.start_soon(self._move, model_id)
        await self._wait(model_id, op_no, request.wait)
        return self._books.reply(model_id, op_no, replayed=verdict == "replay")

    async def poll(self, model_id: str, op_no: int, wait: float) -> OpReply:
        await self._wait(model_id, op_no, wait)
        return self._books.reply(model_id, op_no)

    def cancel(self, model_id: str, op_no: int) -> OpReply:
        self._books.cancel(model_id, op_no)
        return self._books.reply(model_id, op_no)

    def state(self) -> State:
        return self._books.state()

    def running(self) -> list[Running]:
        return [work.running() for work in self._work.values()]

    async def snapshot(self, request: SnapshotRequest) -> SnapshotReply:
        """Between two operations of the model. A TinkError has published nothing."""
        self._books.admit(request.incarnation, request.lease)
        async with self._turn(request.model_id):
            book = self._books.book(request.model_id)
            with self._working(request.model_id, book.applied, "snapshot"):
                files = await self._world.run_sync(
                    self._engine.snapshot,
                    request.model_id,
                    request.path,
                    msgspec.msgpack.encode(book),
                    f"snapshot:{request.model_id}:{book.applied}",
                )
        log.info("snapshot", model=request.model_id, applied=book.applied, path=request.path)
        return SnapshotReply(book.applied, files)

    async def restore(self, request: RestoreRequest) -> RestoreReply:
        """A TinkError, as when the snapshot is damaged, has changed nothing."""
        model_id = request.model_id
        self._books.admit(request.incarnation, request.lease)
        async with self._turn(model_id):
            encoded = await self._world.run_sync(self._engine.read_book, request.path)
            book = msgspec.msgpack.decode(encoded, type=Book)
            with self._books.restoring(model_id, book), self._working(model_id, book.applied, "restore"):
                await self._world.run_sync(self._engine.restore, model_id, request.path)
        log.info("restored", model=model_id, applied=book.applied, path=request.path)
        return RestoreReply(book.applied)

    async def finish(self) -> None:
        """Starts nothing more, and returns when nothing runs."""
        self._finishing = True
        for _ in range(int(self._slots.total_tokens)):
            await self._slots.acquire_on_behalf_of(object())

    # -- the inside ---------------------------------------------------------------------------------

    async def _wait(self, model_id: str, op_no: int, wait: float) -> None:
        ended = self._ended.get((model_id, op_no))
        if ended is not None:
            with trio.move_on_after(min(max(0.0, wait), MAX_OP_WAIT)):
                await ended.wait()

    @asynccontextmanager
    async def _turn(self, model_id: str) -> AsyncIterator[None]:
        """The model to oneself, and a slot to work in."""
        lock = self._locks.setdefault(model_id, trio.Lock())
        async with lock, self._slots:
            yield

    @contextmanager
    def _working(self, model_id: str, op_no: int, job_id: str) -> Iterator[Work]:
        """Within `_turn`: a model has one work at a time."""
        work = self._work[model_id] = Work(self._world.monotonic, model_id, op_no, job_id)
        try:
            with self._idleness.interrupted(), working(work):
                yield work
        finally:
            del self._work[model_id]

    async def _move(self, model_id: str) -> None:
        while request := self._books.head(model_id):
            async with self._turn(model_id):
                if self._finishing:
                    return
                outcome = await self._perform(request)
                crash.point("trainer.applied")
                self._books.finish(model_id, outcome)
                crash.point("trainer.kept")
            self._ended.pop((model_id, request.op_no)).set()
        self._moving.remove(model_id)

    async def _perform(self, request: OpRequest) -> Outcome:
        came = self._came.pop((request.model_id, request.op_no))
        if not self._books.start(request.model_id):
            return Outcome(request.job_id, "failed", failure=CANCELLED)
        with self._working(request.model_id, request.op_no, request.job_id) as work:
            queued_ms = (self._world.monotonic() - came) * 1000
            idle_ms = self._idleness.take() * 1000
            result, failure = await perform(
                self._world, apply, self._engine, request, model=request.model_id, op_no=request.op_no
            )
            run_ms = work.seconds * 1000
        log.info(
            "op",
            model=request.model_id,
            op_no=request.op_no,
            op=type(request.op).__name__,
            job=request.job_id,
            ms=round(run_ms, 1),
            queued_ms=round(queued_ms, 1),
            idle_ms=round(idle_ms, 1),
            loss=result.loss if result else None,
            failure=failure.message if failure else None,
        )
        if result is None:
            return Outcome(request.job_id, "failed", failure=failure)
        timed = msgspec.structs.replace(result, run_ms=run_ms, queued_ms=queued_ms, idle_ms=idle_ms)
        return Outcome(request.job_id, "done", timed)


def apply(engine: Engine, request: OpRequest) -> OpResult:
    """Does the operation. Raises what the engine raises."""
    crash.point("trainer.taken")
    model_id, op = request.model_id, request.op
    origin = f"{model_id}:{request.op_no}:{request.job_id}"
    match op:
        case CreateModel():
            model = engine.create(model_id, op)
            if op.export is None:
                return OpResult(model=model)
            try:
                files = engine.export_adapter(model_id, ExportAdapter(op.export), origin)
            except BaseException:
                engine.remove(model_id)
                raise
            return OpResult(model=model, files=files)
        case Forward():
            return engine.forward(model_id, op)
        case ForwardBackward():
            return engine.forward_backward(model_id, op)
        case OptimStep():
            return OpResult(metrics=engine.optim_step(model_id, op))
        case SaveState():
            return OpResult(files=engine.save_state(model_id, op, origin))
        case LoadState():
            engine.load_state(model_id, op)
            return OpResult()
        case ExportAdapter():
            return OpResult(files=engine.export_adapter(model_id, op, origin))
        case RemoveModel():
            engine.remove(model_id)
            return OpResult()
        case Skip():
            return OpResult()
        case _:
            assert_never(op)
