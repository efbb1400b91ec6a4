"""The journal as the worker sees it: `append` events, and read the state that they make.

    async with Journal.open(home, world, ...) as journal:
        await journal.append((Subject(job_id=...), JobDone(...)))
        journal.ledger            the projections in memory: open jobs, everything else

Everything that `append` returned for is on stable storage.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

import msgspec
import trio
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError

from tink import crash
from tink.domain import rows
from tink.domain.events import (
    AnyEvent,
    IncarnationStarted,
    IncarnationStopped,
    JobAccepted,
    Record,
    Subject,
    TrainerStarted,
)
from tink.domain.projection import Ledger, project
from tink.errors import JournalUnavailable, StartupError
from tink.journal import migrations, schema, store
from tink.journal.bodies import BodyStore
from tink.journal.commits import GroupCommit
from tink.journal.database import database_errors, reader_engine, writer_engine
from tink.journal.home import Home
from tink.limits import BATCH_BYTES, READ_CONNECTIONS, RECENT_JOBS
from tink.world import World

Entry = tuple[Subject, AnyEvent]
T = TypeVar("T")


class Journal:
    """Made by `open`. `incarnation` counts the workers that opened it: 1, 2, 3, ..."""

    def __init__(self, home: Home, world: World) -> None:
        self._home, self._world = home, world
        self._engine = writer_engine(home.journal)
        self._connection = self._engine.connect()
        self._reader = reader_engine(home.journal)
        self._readers = trio.CapacityLimiter(READ_CONNECTIONS)
        self._seq = 0
        self._committed: list[Record] = []
        self._acceptances: dict[str, JobAccepted] = {}  # of open jobs
        self._recent: OrderedDict[str, rows.Job] = OrderedDict()
        self._commits: GroupCommit[Entry] = GroupCommit(
            self._commit, world, max_bytes=BATCH_BYTES, then=self._apply
        )
        # Held by whoever decides from the ledger that a name is free, until he has committed it: sampler
        # numbers come from several places.
        self.naming = trio.Lock()
        self.bodies = BodyStore(home.bodies, world)
        self.ledger = Ledger()
        self.last_trainer: TrainerStarted | None = None
        self.incarnation = 0

    @classmethod
    @asynccontextmanager
    async def open(
        cls, home: Home, world: World, *, version: str, settings_digest: str
    ) -> AsyncIterator[Journal]:
        """Migrates, checks that the tables are the fold of the events, and opens a new incarnation. The
        caller holds the home's lock. Raises StartupError if the journal cannot be used; leaves by
        JournalUnavailable, through every task inside, as soon as a commit fails."""
        await world.run_sync(prepare, home)
        journal = await world.run_sync(cls, home, world)
        try:
            journal.ledger = await world.run_sync(journal._load)
            journal.incarnation = 1 + max(
                (key[0] for key in journal.ledger.tables["incarnations"]), default=0
            )
            async with trio.open_nursery() as nursery:
                nursery.start_soon(journal._commits.run)
                nursery.start_soon(journal.bodies.run)
                opened = IncarnationStarted(
                    number=journal.incarnation,
                    boot_id=world.new_id(),
                    version=version,
                    settings_digest=settings_digest,
                )
                await journal.append((Subject(), opened))
                crash.point("worker.opened")
                yield journal
                stopped = IncarnationStopped(number=journal.incarnation, reason="stopped")
                await journal.append((Subject(), stopped))
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await world.run_sync(journal._close)

    async def append(self, *entries: Entry) -> None:
        """Commits the entries in one transaction, with their projections, and applies them to `ledger`.

        Raises JournalUnavailable if the commit failed; the worker is stopping then. If it is cancelled
        the entries are committed all the same.
        """
        await self._commits.submit(list(entries), sum(_size(event) for _subject, event in entries))

    async def job(self, job_id: str) -> rows.Job | None:
        """A job by its id, open or ended, or None."""
        hot = self.ledger.table("jobs", rows.Job).get((job_id,)) or self._recent.get(job_id)
        if hot is not None:
            await trio.lowlevel.checkpoint()
            return hot

        def read() -> rows.Job | None:
            with database_errors("reading a job"), self._reader.connect() as connection:
                query = select(schema.jobs).where(schema.jobs.c.job_id == job_id)
                row = connection.execute(query).mappings().one_or_none()
                return None if row is None else rows.Job(**row)

        return await self._world.run_sync(read, limiter=self._readers)

    async def acceptance(self, job: rows.Job) -> JobAccepted:
        """The event that accepted a job: it holds the request of a command."""
        if job.job_id in self._acceptances:
            await trio.lowlevel.checkpoint()
            return self._acceptances[job.job_id]

        def read() -> JobAccepted:
            with database_errors("reading an event"), self._reader.connect() as connection:
                event = store.event_of(connection, job.accepted_seq).event
            assert isinstance(event, JobAccepted), f"event {job.accepted_seq} is no acceptance"
            return event

        return await self._world.run_sync(read, limiter=self._readers)

    async def ops(self, model_id: str, after: int, upto: int) -> list[rows.Job]:
        """A model's jobs with after < op_no <= upto, in order: what a redo applies again."""
        table = schema.jobs

        def read() -> list[rows.Job]:
            query = select(table).where(
                table.c.model_id == model_id, table.c.op_no > after, table.c.op_no <= upto
            )
            with database_errors("reading a model's jobs"), self._reader.connect() as connection:
                found = connection.execute(query.order_by(table.c.op_no)).mappings()
                return [rows.Job(**row) for row in found]

        return await self._world.run_sync(read, limiter=self._readers)

    async def redo_ms(self, model_id: str, after: int) -> float:
        """How long the model's operations behind op_no `after` ran."""
        table = schema.jobs

        def read() -> float:
            query = select(func.coalesce(func.sum(table.c.run_ms), 0.0)).where(
                table.c.model_id == model_id, table.c.op_no > after
            )
            with database_errors("reading a model's jobs"), self._reader.connect() as connection:
                return float(connection.execute(query).scalar_one())

        return await self._world.run_sync(read, limiter=self._readers)

    async def directories_loaded(self) -> set[str]:
        """The directories that a model was loaded from, ever."""
        table = schema.jobs

        def read() -> set[str]:
            query = select(table.c.directory).where(
                table.c.op == "load_weights", table.c.directory.is_not(None)
            )
            with database_errors("reading the loads"), self._reader.connect() as connection:
                return set(connection.execute(query).scalars())

        return await self._world.run_sync(read, limiter=self._readers)

    # -- on the writer's thread ---------------------------------------------------------------------

    def _commit(self, entries: list[Entry]) -> None:
        now = self._world.now()
        records = [
            Record(seq=seq, at=now, incarnation=self.incarnation, subject=subject, event=event)
            for seq, (subject, event) in enumerate(entries, self._seq + 1)
        ]
        try:
            with database_errors("the journal could not commit"), self._connection.begin():
                store.write(self._connection, records)
        except JournalUnavailable as error:
            if isinstance(error.__cause__, IntegrityError):
                raise JournalUnavailable(
                    f"{error}: another process has written to {self._home.journal}, or this is a bug"
                ) from error
            raise
        self._seq += len(records)
        self._committed = records

    def _load(self) -> Ledger:
        with database_errors("reading the journal"), self._connection.begin():
            self._seq = store.last_seq(self._connection)
            self.last_trainer = store.last_trainer(self._connection)
            stored = Ledger()
            try:
                stored = store.read_tables(self._connection, closed_jobs=True)
                wrong = store.check(self._connection, stored)
            except (LookupError, msgspec.DecodeError) as error:
                wrong = [str(error)]
        if wrong:
            raise StartupError(
                f"{self._home.journal} is damaged: its tables are not what its events say "
                f"({len(wrong)} differences, the first: {wrong[0][:300]}); restore a backup, or look at it "
                "with 'tink db check'"
            )
        jobs = stored.table("jobs", rows.Job)
        for key in [key for key, job in jobs.items() if job.state not in rows.OPEN]:
            del jobs[key]
        return stored

    def _close(self) -> None:
        self.bodies.close()
        self._connection.close()
        self._engine.dispose()
        self._reader.dispose()

    # -- on the Trio thread, in commit order --------------------------------------------------------

    def _apply(self) -> None:
        jobs = self.ledger.table("jobs", rows.Job)
        for record in self._committed:
            self.ledger.apply(project(record))
            job_id = record.subject.job_id
            job = jobs.get((job_id,))
            if job_id is None or job is None:
                continue
            if isinstance(record.event, JobAccepted):
                self._acceptances[job_id] = record.event
            elif job.state not in rows.OPEN:
                self._recent[job_id] = jobs.pop((job_id,))
                self._acceptances.pop(job_id, None)
        while len(self._recent) > RECENT_JOBS:
            self._recent.popitem(last=False)


def prepare(home: Home) -> None:
    """Migrates both databases, under the home's lock."""
    for path, database in ((home.journal, "journal"), (home.bodies, "bodies")):
        engine = writer_engine(path)
        try:
            with database_errors(f"{path} cannot be opened"), engine.connect() as connection:
                migrations.upgrade(connection, database)  # type: ignore[arg-type]
        except JournalUnavailable as error:
            raise StartupError(str(error)) from error
        finally:
            engine.dispose()


def _size(event: AnyEvent) -> int:
    return len(msgspec.json.encode(event))
