"""The jobs of an actor: those that wait for it, in the order in which they came, those that it runs, and
those that it is told to expect; and how one of them is run to its end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog
import trio

from tink import crash
from tink.actors.books import Books
from tink.domain import rows
from tink.domain.events import Entry
from tink.errors import JournalUnavailable, StartupError

log = structlog.get_logger()

INTERNAL = "internal error in the worker: its log has it"

# Called with a job's id: once its terminal event is durable, its waiters may be told; and once nothing is
# left to do with its model, the model's next job may run.
Settle = Callable[[str], Awaitable[None]]
Release = Callable[[str], Awaitable[None]]


class Jobs:
    """At most `slots` run at once, beside those that have stepped aside. A job is here once, however often
    it is sent."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._waiting: dict[str, None] = {}
        self._expected: dict[str, None] = {}
        self._ahead: set[str] = set()
        self._running: set[str] = set()
        self._aside: set[str] = set()
        self._changed = trio.Event()

    def send(self, job_id: str) -> None:
        """Never blocks: open jobs are bounded where they are accepted."""
        if job_id not in self._running:
            self._waiting.setdefault(job_id)
            self._expected.pop(job_id, None)
            self.wake()

    def expect(self, job_id: str) -> None:
        """It will be sent once another one, which runs or waits here, has ended: until then it is not run,
        but it is among those that are `coming`."""
        if job_id not in self._running and job_id not in self._waiting:
            self._expected.setdefault(job_id)
            self.wake()

    def coming(self) -> list[str]:
        """Those that cannot run yet, and will, in about that order."""
        return [*(self._waiting if self._full else ()), *self._expected]

    @property
    def room(self) -> int:
        """How many jobs that are sent now have their turn now."""
        return self.slots - len(self._running) + len(self._aside) - len(self._waiting)

    def waits(self, job_id: str) -> bool:
        """Whether it has its turn as soon as there is a slot."""
        return job_id in self._waiting

    async def changed(self) -> None:
        """Returns when a job has come, begun or ended, or somebody calls `wake`."""
        await self._changed.wait()

    def wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def ahead(self, job_id: str) -> None:
        """It is at its server before its turn, which comes before that of all that are not."""
        if job_id not in self._running:
            self._ahead.add(job_id)
        self.wake()

    def withdraw(self, job_id: str) -> bool:
        """Takes back a job that waits; False if it is run already, or is not here."""
        waits = job_id in self._waiting
        self._waiting.pop(job_id, None)
        return waits

    def step_aside(self, job_id: str) -> None:
        """What is left to do for a job that runs needs no slot."""
        if job_id in self._running:
            self._aside.add(job_id)
            self.wake()

    def clear(self) -> None:
        """Forgets those that it does not run."""
        self._waiting.clear()
        self._expected.clear()
        self._ahead.clear()

    async def run(self, run_one: Callable[[str], Awaitable[None]]) -> None:
        """Runs them for ever. What `run_one` raises ends all that run."""
        async with trio.open_nursery() as nursery:
            while True:
                while not self._waiting or self._full:
                    await self._changed.wait()
                job_id = next(
                    (one for one in self._waiting if one in self._ahead), next(iter(self._waiting))
                )
                del self._waiting[job_id]
                self._ahead.discard(job_id)
                self._running.add(job_id)
                self.wake()
                nursery.start_soon(self._run_one, run_one, job_id)

    async def _run_one(self, run_one: Callable[[str], Awaitable[None]], job_id: str) -> None:
        try:
            await run_one(job_id)
        finally:
            self._running.discard(job_id)
            self._aside.discard(job_id)
            self.wake()

    @property
    def _full(self) -> bool:
        return len(self._running) - len(self._aside) >= self.slots


async def run_to_end(
    job_id: str,
    journal: Books,
    run: Callable[[rows.Job], Awaitable[None]],
    crashed: Callable[[rows.Job], list[Entry]],
    settle: Settle,
) -> rows.Job | None:
    """Returns the job once `run` has journaled its end; None if it was sent twice, and has ended. A bug
    that it meets fails it, in the words of `crashed`, and the others go on."""
    job = journal.ledger.jobs.get((job_id,))
    if job is None:
        return None
    try:
        await run(job)
    except (JournalUnavailable, StartupError):
        raise
    except Exception:
        log.exception("job crashed", job=job_id)
        await append_end(journal, crashed(job))
    crash.point("worker.ended")
    await settle(job_id)
    return job


async def append_end(journal: Books, entries: list[Entry]) -> None:
    """Shielded: whoever takes the job up again must know whether it has ended."""
    with trio.CancelScope(shield=True):
        await journal.append(*entries)
