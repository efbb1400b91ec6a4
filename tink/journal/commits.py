"""Group commit: one writer, and a batch is whatever arrived while the last one was being committed.

There is no timer. One item alone costs one fsync; under load the batches grow by themselves, and the
cost per item falls by a factor of thirty. The open batch is bounded in items and bytes: `submit` then
waits, which is the back-pressure of everything above it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

import structlog
import trio

from tink.errors import JournalUnavailable
from tink.limits import BATCH_ROWS, DATABASE_BEAT_SECONDS, SLOW_COMMIT_SECONDS
from tink.world import World

log = structlog.get_logger()

Item = TypeVar("Item")


class _Batch(Generic[Item]):
    def __init__(self) -> None:
        self.items: list[Item] = []
        self.size = 0
        self.done = trio.Event()
        self.error: JournalUnavailable | None = None


class GroupCommit(Generic[Item]):
    """`commit(items)` is a blocking function that makes them durable together or raises
    JournalUnavailable. It runs in a thread and cannot be cancelled. `then()` is called on the Trio
    thread after each commit, before anyone who waits for it goes on."""

    def __init__(
        self,
        commit: Callable[[list[Item]], None],
        world: World,
        *,
        name: str,
        max_bytes: int,
        max_items: int = BATCH_ROWS,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        self._commit, self._world, self._then = commit, world, then
        self._name = name
        self._began: float | None = None  # when the commit that is under way began
        self._max_bytes, self._max_items = max_bytes, max_items
        self._open: _Batch[Item] = _Batch()
        self._work = trio.Event()
        self._room = trio.Event()
        self._line: deque[object] = deque()
        self._thread = trio.CapacityLimiter(1)
        self._failed: JournalUnavailable | None = None

    async def submit(self, items: list[Item], size: int) -> None:
        """Returns when `items` (of `size` bytes) are durable; they are in one transaction.

        Raises JournalUnavailable if that failed: they may or may not be on disk; and if the writer has
        ended. Cancellation only leaves the wait: the items are committed all the same, so to the caller
        they are "maybe".
        """
        if not items:
            await trio.lowlevel.checkpoint()
            return
        # First come, first committed: what is submitted later may build on what was submitted before.
        if self._line or self._full(len(items), size):
            await self._wait_for_room(len(items), size)
        if self._failed is not None:
            raise self._failed
        batch = self._open
        batch.items.extend(items)
        batch.size += size
        self._work.set()
        await batch.done.wait()
        if batch.error is not None:
            raise batch.error

    async def _wait_for_room(self, items: int, size: int) -> None:
        """Returns, without another checkpoint, when it is this one's turn and there is room; or when the
        writer has failed."""
        me = object()
        self._line.append(me)
        try:
            while self._failed is None and (self._line[0] is not me or self._full(items, size)):
                await self._room.wait()
        finally:
            self._line.remove(me)
            self._make_room()

    def _make_room(self) -> None:
        """Those who wait look again."""
        self._room.set()
        self._room = trio.Event()

    def _full(self, items: int, size: int) -> bool:
        """A batch with nothing in it takes anything: what is larger than a batch goes alone."""
        if not self._open.items:
            return False
        return len(self._open.items) + items > self._max_items or self._open.size + size > self._max_bytes

    async def run(self) -> None:
        """Commits batches until cancelled; what was submitted by then is committed first. A commit that
        fails ends it with JournalUnavailable, after every waiter has been told: fail-stop."""
        try:
            while True:
                await self._work.wait()
                await self._commit_open()
        except trio.Cancelled:
            while self._open.items:
                await self._commit_open()
            self._end(JournalUnavailable("the journal is closed"))
            raise

    async def watch(self) -> None:
        """Tells of a commit that takes long, once, while it does: a disk that hangs says nothing."""
        told: float | None = None
        while True:
            await trio.sleep(SLOW_COMMIT_SECONDS / 2)
            if self._began is None or self._began == told:
                continue
            took = self._world.monotonic() - self._began
            if took > SLOW_COMMIT_SECONDS:
                told = self._began
                log.warning("a commit takes long", to=self._name, seconds=round(took))

    async def beat(self, say: Callable[[], None]) -> None:
        """Calls `say`, which blocks, between two commits, again and again. Raises what it raises, after
        every waiter has been told: fail-stop."""
        while True:
            await trio.sleep(DATABASE_BEAT_SECONDS)
            try:
                await self._world.run_sync(say, limiter=self._thread)
            except JournalUnavailable as error:
                self._end(error)
                raise

    async def _commit_open(self) -> None:
        batch, self._open = self._open, _Batch()
        self._work = trio.Event()
        self._make_room()
        self._began = self._world.monotonic()
        try:
            # Shielded as a whole: a batch that was taken is committed, or its waiters hear of an error.
            with trio.CancelScope(shield=True):
                await self._world.run_sync(self._commit_in_turn, batch.items, limiter=self._thread)
            self._then()
        except BaseException as error:
            # Of any kind: whoever waits must not take an interrupted commit for one that was made.
            batch.error = unavailable = _unavailable(error)
            self._end(unavailable)
            if isinstance(error, Exception) and unavailable is not error:
                raise unavailable from error
            raise
        finally:
            self._began = None
            batch.done.set()

    def _commit_in_turn(self, items: list[Item]) -> None:
        """On the thread: while it was waited for, somebody else may have found that nothing can be
        committed any more, and have told so."""
        if self._failed is not None:
            raise self._failed
        self._commit(items)

    def _end(self, error: JournalUnavailable) -> None:
        """No more commits: all who wait, and all who come, are told."""
        self._failed = self._open.error = error
        self._open.items.clear()
        self._open.done.set()
        self._room.set()


def _unavailable(error: BaseException) -> JournalUnavailable:
    if isinstance(error, JournalUnavailable):
        return error
    return JournalUnavailable(f"the commit failed: {type(error).__name__}: {error}")
