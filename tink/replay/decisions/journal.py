"""The journal of a worker that is replayed: its state is that of the record, and what the worker appends is
held until the record has come to it."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Sequence, Set
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import trio
from sqlalchemy import Connection

from tink.domain import rows
from tink.domain.events import AnyEvent, Entry, IncarnationStarted, JobAccepted, Record, Subject, kind_of
from tink.domain.ledger import Ledger
from tink.domain.memory import RowId
from tink.domain.projection import Key
from tink.errors import JournalUnavailable, StartupError, UserError
from tink.journal import queries, store
from tink.journal.bodies import BodyStore, decompressed
from tink.journal.journal import Journal
from tink.journal.recording import Recording
from tink.world import World

T = TypeVar("T")

# By its job; by its kind and whom it is about, where it is no job's.
Place = tuple[str | None, ...]


def place_of(subject: Subject, event: AnyEvent) -> Place:
    if subject.job_id is not None:
        return (subject.job_id,)
    return kind_of(event), subject.session_id, subject.model_id


class Passed(bytes):
    """A request or a result that goes through the worker unread: its name and its size stand for it."""

    digest: str
    size: int

    @classmethod
    def of(cls, digest: str | None, size: int) -> Passed:
        passed = cls()
        passed.digest, passed.size = str(digest), size
        return passed

    def __len__(self) -> int:
        return self.size


class Append:
    """Entries that the worker wants to commit, and waits for."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries
        self._done = trio.Event()
        self._broken = False

    def commit(self) -> None:
        self._done.set()

    def refuse(self) -> None:
        """The worker ends: it is not told whether they were committed."""
        self._broken = True
        self._done.set()

    async def wait(self) -> None:
        await self._done.wait()
        if self._broken:
            raise JournalUnavailable("the replayed worker has ended")


class RecordedBodies(BodyStore):
    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    async def put(self, content: bytes) -> str:
        await trio.lowlevel.checkpoint()
        return content.digest if isinstance(content, Passed) else hashlib.sha256(content).hexdigest()

    async def get(self, digest: str) -> bytes:
        await trio.lowlevel.checkpoint()
        return self._recording.body(digest)

    def named(self, digest: str) -> None:
        """Nothing is kept for it."""


class RecordedJournal(Journal):
    """`pending`: what the worker has appended. `commit` goes on in the record. What is read is what the
    record held at that place, of which `Journal` has the rows that live, and this the others."""

    def __init__(self, recording: Recording, world: World) -> None:
        self._recording, self._world = recording, world
        self._seq = self.incarnation = self.diverged = 0
        self._committed: list[Record] = []
        self._acceptances: dict[str, JobAccepted] = {}
        self._held: Counter[RowId] = Counter()
        self._recent: OrderedDict[str, rows.Job] = OrderedDict()
        self.naming = trio.Lock()
        self.bodies = RecordedBodies(recording)
        self.ledger = Ledger()
        self.last_trainer = None
        self.home_id = ""
        self.observers = []
        self.pending: dict[Place, Append] = {}
        self._ended: dict[str, rows.Adapter] = {}

    async def append(self, *entries: Entry) -> None:
        appended = self.pending[place_of(*entries[0])] = Append(entries)
        await appended.wait()

    def commit(self, records: Sequence[Record]) -> None:
        """What the record says has happened. StartupError if that cannot be."""
        for record in records:
            if isinstance(record.event, IncarnationStarted):
                self.incarnation = record.incarnation
        self._committed = list(records)
        try:
            self._apply()
        except LookupError as error:
            raise StartupError(
                f"event {records[0].seq} cannot follow what is before it ({error}): "
                "'tink db check' tells more"
            ) from error

    def end_worker(self) -> None:
        """Whoever waits for a commit does not get it. The next worker begins with nothing held."""
        for appended in self.pending.values():
            appended.refuse()
        self.pending.clear()
        self.naming = trio.Lock()

    def _forget_if_ended(self, table: str, key: Key) -> None:
        row = self.ledger.tables[table][key]
        super()._forget_if_ended(table, key)
        if isinstance(row, rows.Adapter) and row.ended:
            self._ended[row.adapter_id] = row

    async def job(self, job_id: str) -> rows.Job | None:
        """Of those that ended long ago none is asked for: a repeat of a request is in no record."""
        await trio.lowlevel.checkpoint()
        return self.ledger.jobs.get((job_id,)) or self._recent.get(job_id)

    async def adapter(self, adapter_id: str) -> rows.Adapter:
        await trio.lowlevel.checkpoint()
        found = self.ledger.adapters.get((adapter_id,)) or self._ended.get(adapter_id)
        if found is None:
            raise LookupError(f"there is no adapter {adapter_id}")
        return found

    @asynccontextmanager
    async def recalled(self, row_ids: Collection[RowId]) -> AsyncIterator[None]:
        """Nothing is ever forgotten."""
        await trio.lowlevel.checkpoint()
        yield

    def forget(self, busy: Set[RowId]) -> None:
        """The tables know the end of the record, and could not give it back."""

    async def acceptance(self, job: rows.Job) -> JobAccepted:
        await trio.lowlevel.checkpoint()
        accepted = self._acceptances.get(job.job_id)
        if accepted is None:
            event = store.event_of(self._recording.journal, job.accepted_seq).event
            assert isinstance(event, JobAccepted), f"event {job.accepted_seq} is no acceptance"
            accepted = event
        return accepted

    async def request(self, job: rows.Job) -> bytes:
        """A batch goes to the trainer unread."""
        accepted = await self.acceptance(job)
        if accepted.invalid is not None:
            raise UserError(accepted.invalid)
        if accepted.request is not None:
            return accepted.request.encode()
        if job.model_id is not None:
            return Passed.of(accepted.body_sha256, accepted.body_bytes)
        return decompressed(self._recording.body(str(accepted.body_sha256)), accepted.codec)

    async def read(self, query: Callable[[Connection], T]) -> T:
        """The tables know the end of the record, and not this place."""
        await trio.lowlevel.checkpoint()
        assert isinstance(query, partial), "a named query"
        if query.func not in (queries.job_of_key, queries.sample_of_key, queries.session_of_key):
            raise LookupError(f"a replay does not answer {query.func.__name__}")
        nobody: Any = None  # the first that came under its key is the one that is in the record
        return nobody  # type: ignore[no-any-return]
