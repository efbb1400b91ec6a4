"""The journal as the worker sees it: `append` events, and read the state that they make.

    async with Journal.open(home, world, ...) as journal:
        await journal.append((Subject(job_id=...), JobDone(...)))
        journal.ledger            the projections in memory: what has not ended

Everything that `append` returned for is on stable storage.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import asynccontextmanager, closing
from decimal import Decimal
from functools import partial
from typing import Any, TypeVar

import msgspec
import trio
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from tink import crash
from tink.domain import rows
from tink.domain.events import (
    AnyEvent,
    Diverged,
    Entry,
    IncarnationStarted,
    IncarnationStopped,
    JobAccepted,
    JobDone,
    Record,
    Subject,
    TrainerStarted,
)
from tink.domain.ledger import Ledger
from tink.domain.memory import RowId
from tink.errors import UNREADABLE, BackendError, JournalUnavailable, StartupError, UserError
from tink.home import Home
from tink.journal import chain, queries, revisions, schema, store
from tink.journal.bodies import BodyStore, Drop, Put, change, decompressed
from tink.journal.commits import GroupCommit
from tink.journal.database import database, database_errors
from tink.journal.present import Present
from tink.journal.revisions import SCHEMAS
from tink.limits import BATCH_BYTES, READ_CONNECTIONS
from tink.world import World

T = TypeVar("T")


class Journal:
    """Made by `open`. `incarnation` counts the workers that opened it: 1, 2, 3, ..."""

    def __init__(self, home: Home, world: World) -> None:
        self._world = world
        self._database = database(home, "journal")
        self._writer = self._database.writer()
        self._connection = self._writer.connection
        self._reader = self._database.reader()
        self._readers = trio.CapacityLimiter(READ_CONNECTIONS)
        self._seq, self._hash = 0, chain.START
        self._committed: list[Record] = []
        self._commits: GroupCommit[Entry | Drop] = GroupCommit(
            self._commit, world, name="journal", max_bytes=BATCH_BYTES, then=self._apply
        )
        # Held by whoever decides from the ledger that a name is free, until he has committed it: sampler
        # numbers come from several places.
        self.naming = trio.Lock()
        try:
            bodies = database(home, "bodies")
            self.bodies = BodyStore(bodies, world, self._reader, self._readers, self._drop)
        except BaseException:
            self._writer.close()
            self._reader.dispose()
            raise
        self.present = Present(Ledger())
        self.last_trainer: TrainerStarted | None = None
        self.incarnation = 0
        # Tells this journal from any other, for ever.
        self.home_id = ""
        # Events of that kind before this incarnation.
        self.diverged = 0

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        home: Home,
        world: World,
        *,
        version: str,
        settings_digest: str,
        acknowledged: chain.Head = chain.NONE,
    ) -> AsyncIterator[Journal]:
        """Migrates, checks that the tables hold what the last events say, and opens a new incarnation: all
        in a time that does not grow with what has ended. The caller holds the home's lock. Raises
        StartupError if the journal cannot be used, or lacks what was `acknowledged`; leaves by
        JournalUnavailable, through every task inside, as soon as a commit fails."""
        await world.run_sync(prepare, home)
        journal = await world.run_sync(cls, home, world)
        try:
            journal.present = Present(await world.run_sync(journal._load, acknowledged))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(journal._commits.run)
                nursery.start_soon(journal.bodies.run)
                nursery.start_soon(journal._commits.watch)
                nursery.start_soon(journal.bodies.watch)
                if journal._database.contended:
                    nursery.start_soon(journal._commits.beat, journal._writer.beat)
                boot_id = world.new_id()
                journal.home_id = journal.home_id or boot_id
                opened = IncarnationStarted(
                    number=journal.incarnation,
                    boot_id=boot_id,
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
        storable, sizes = zip(*map(_storable, entries), strict=True) if entries else ((), ())
        named = (digest for _, event in entries for digest in _bodies_named(event))
        bodies = sum(len(self.bodies.short(digest) or b"") for digest in named)
        await self._commits.submit(list(storable), sum(sizes) + bodies)

    @property
    def ledger(self) -> Ledger:
        return self.present.ledger

    @property
    def head(self) -> chain.Head:
        """The last event that was committed."""
        return chain.Head(self._seq, self._hash)

    async def job(self, job_id: str) -> rows.Job | None:
        """A job by its id, open or ended, or None."""
        hot = self.present.job(job_id)
        if hot is not None or self.present.has_no_job(job_id):
            await trio.lowlevel.checkpoint()
            return hot
        return await self.read(partial(queries.job, job_id=job_id))

    async def job_of_key(self, model_id: str, key: str) -> rows.Job | None:
        return await self.read(partial(queries.job_of_key, model_id=model_id, key=key))

    async def sample_of_key(self, tenant: str, key: str) -> rows.Job | None:
        return await self.read(partial(queries.sample_of_key, tenant=tenant, key=key))

    async def session_of_key(self, tenant: str, key: str) -> rows.Session | None:
        return await self.read(partial(queries.session_of_key, tenant=tenant, key=key))

    async def adapter(self, adapter_id: str) -> rows.Adapter:
        """An adapter version. LookupError if there is none."""
        hot = self.ledger.adapters.get((adapter_id,))
        if hot is not None:
            await trio.lowlevel.checkpoint()
            return hot
        found = await self.read(partial(queries.adapter, adapter_id=adapter_id))
        if found is None:
            raise LookupError(f"there is no adapter {adapter_id}")
        return found

    @asynccontextmanager
    async def recalled(self, row_ids: Collection[RowId]) -> AsyncIterator[None]:
        """What the journal has of that is in memory while the body runs, though it may have been
        forgotten."""
        self.present.hold(row_ids)
        try:
            if lacking := self.present.lacking(row_ids):
                self.present.recall(await self.read(partial(queries.at, row_ids=lacking)))
            yield
        finally:
            self.present.release(row_ids)

    async def acceptance(self, job: rows.Job) -> JobAccepted:
        """The event that accepted a job: it holds the request of a command."""
        hot = self.present.acceptance(job.job_id)
        if hot is not None:
            await trio.lowlevel.checkpoint()
            return hot
        return await self.read(partial(store.acceptance, job=job))

    async def request(self, job: rows.Job) -> bytes:
        """The request of a job as its client sent it, decompressed. UserError if it was not a valid one,
        BackendError if it is lost."""
        accepted = await self.acceptance(job)
        if accepted.invalid is not None:
            raise UserError(accepted.invalid)
        if accepted.request is not None:
            return accepted.request.encode()
        assert accepted.body_sha256 is not None, "a data op has a body"
        try:
            body = await self.bodies.get(accepted.body_sha256)
        except LookupError as error:
            raise BackendError(f"the request of {job.job_id} is lost: {error}") from error
        return decompressed(body, accepted.codec)

    async def _drop(self, drops: list[Drop]) -> None:
        """Deletes these short bodies: durable when it returns."""
        await self._commits.submit(list(drops), 0)

    def _short(self, event: AnyEvent, now: float) -> Iterator[Put]:
        """The bodies that are to be committed with the event."""
        for digest in _bodies_named(event):
            content = self.bodies.short(digest)
            if content is not None:
                yield Put.of(content, digest, now)

    async def read(self, query: Callable[[Connection], T]) -> T:
        """What `query`, which runs in a thread, finds: everything that is committed now."""

        def read() -> T:
            with database_errors("reading the journal"), self._reader.connect() as connection:
                return query(connection)

        return await self._world.run_sync(read, limiter=self._readers)

    # -- on the writer's thread ---------------------------------------------------------------------

    def _commit(self, items: list[Entry | Drop]) -> None:
        now = self._world.now()
        # What goes first: nothing of this batch is among it.
        drops = [item for item in items if isinstance(item, Drop)]
        entries = [item for item in items if not isinstance(item, Drop)]
        records = [
            Record(seq=seq, at=now, incarnation=self.incarnation, subject=subject, event=event)
            for seq, (subject, event) in enumerate(entries, self._seq + 1)
        ]
        short = [body for record in records for body in self._short(record.event, now)]
        last = self._hash
        try:
            with database_errors("the journal could not commit"), self._connection.begin():
                change(self._connection, schema.short_bodies, [*drops, *short])
                if records:
                    last = store.write(self._connection, records, last)
            self._writer.check()
        except JournalUnavailable as error:
            if isinstance(error.__cause__, IntegrityError):
                raise JournalUnavailable(
                    f"{error}: another process has written to {self._database.place}, or this is a bug"
                ) from error
            raise
        self._seq, self._hash = self._seq + len(records), last
        self._committed = records

    def _load(self, acknowledged: chain.Head) -> Ledger:
        with database_errors("reading the journal"), self._connection.begin():
            self._seq, self._hash = chain.head(self._connection)
            if acknowledged.seq and chain.hash_of(self._connection, acknowledged.seq) != acknowledged.hash:
                raise StartupError(
                    f"{self._database.place} lacks event {acknowledged.seq}, which was acknowledged (its "
                    f"last one is {self._seq}): a replica that had not got all of it has taken over, or a "
                    "backup was restored; docs/operations.md says what to do"
                )
            self.incarnation = 1 + store.last_incarnation(self._connection)
            present = Ledger()
            try:
                self.last_trainer = store.last_trainer(self._connection)
                self.home_id = store.first_boot(self._connection) or ""
                self.diverged = store.count(self._connection, Diverged)
                present = store.read_present(self._connection)
                wrong = store.check_end(self._connection, present)
            except (LookupError, *UNREADABLE) as error:
                wrong = [str(error)]
        if wrong:
            raise store.damaged(self._database.place, wrong)
        return present

    def _close(self) -> None:
        self.bodies.close()
        self._writer.close()
        self._reader.dispose()

    # -- on the Trio thread, in commit order --------------------------------------------------------

    def _apply(self) -> None:
        for record in self._committed:
            for digest in _bodies_named(record.event):
                self.bodies.named(digest)
            self.present.apply(record)


def prepare(home: Home) -> None:
    """Migrates both databases, under the home's lock."""
    for name in SCHEMAS:
        found = database(home, name)
        try:
            with database_errors(f"{found.place} cannot be opened"):
                with closing(found.writer()) as writer:
                    if revisions.look(writer.connection, name).kind == "head":
                        continue
                # Alembic takes longer to be imported than all the rest of a start.
                from tink.journal import migrations

                migrations.upgrade(found, whole=not home.bundle.exists())
        except JournalUnavailable as error:
            if found.contended:  # it may come back: whoever runs a worker waits for it
                raise
            raise StartupError(str(error)) from error


def _bodies_named(event: AnyEvent) -> Iterator[str]:
    if isinstance(event, JobAccepted) and event.body_sha256 is not None:
        yield event.body_sha256
    elif isinstance(event, JobDone) and event.result_sha256 is not None:
        yield event.result_sha256


# A NUL, or a number that is written with an exponent; or a text that looks like one of them.
_AWKWARD = re.compile(rb"\\u0000|\de\d")


def _storable(entry: Entry) -> tuple[Entry, int]:
    """The same, and its size, as any database gives it back: clients' names and metadata, and errors, may
    have in them what PostgreSQL does not take."""
    subject, event = entry
    encoded = msgspec.json.encode(event)
    if _AWKWARD.search(encoded):
        event = msgspec.convert(_plain(msgspec.to_builtins(event)), type(event))
    return (subject, event), len(encoded)


def _plain(value: Any) -> Any:
    match value:
        case str():  # its texts have no NUL
            return value.replace("\0", "\N{REPLACEMENT CHARACTER}")
        case float() if value.is_integer() and abs(value) >= chain.EXACT:  # its numbers have no exponent
            return int(Decimal(repr(value)))
        case dict():
            return {_plain(name): _plain(part) for name, part in value.items()}
        case list() | tuple():
            return [_plain(part) for part in value]
    return value
