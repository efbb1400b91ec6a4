"""The journal of a worker that is replayed: its state is that of the record, and what the worker appends is
held until the record has come to it."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Collection, Sequence, Set
from contextlib import asynccontextmanager
from typing import TypeVar

import trio
from sqlalchemy import Connection

from tink.domain import rows
from tink.domain.events import AnyEvent, Entry, IncarnationStarted, JobAccepted, Record, Subject, kind_of
from tink.domain.ledger import Ledger
from tink.domain.memory import RowId
from tink.errors import JournalUnavailable, StartupError, UserError
from tink.journal import store
from tink.journal.bodies import decompressed
from tink.journal.present import Present
from tink.journal.recording import Recording

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


class RecordedBodies:
    """JobBodies."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    async def put(self, content: bytes) -> str:
        await trio.lowlevel.checkpoint()
        return content.digest if isinstance(content, Passed) else hashlib.sha256(content).hexdigest()

    async def get(self, digest: str) -> bytes:
        await trio.lowlevel.checkpoint()
        return self._recording.body(digest)


class _Lasting(Present):
    def forget(self, busy: Set[RowId]) -> None:
        """The tables know the end of the record, and could not give it back."""


class RecordedJournal:
    """JobBooks. `pending`: what the worker has appended. `commit` goes on in the record. What is read is
    what the record held at that place."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self.present = _Lasting(Ledger())
        self._ended: dict[str, rows.Adapter] = {}
        self.bodies = RecordedBodies(recording)
        self.naming = trio.Lock()
        self.incarnation = 0
        self.pending: dict[Place, Append] = {}

    @property
    def ledger(self) -> Ledger:
        return self.present.ledger

    async def append(self, *entries: Entry) -> None:
        appended = self.pending[place_of(*entries[0])] = Append(entries)
        await appended.wait()

    def commit(self, records: Sequence[Record]) -> None:
        """What the record says has happened. StartupError if that cannot be."""
        try:
            for record in records:
                if isinstance(record.event, IncarnationStarted):
                    self.incarnation = record.incarnation
                ended = self.present.apply(record)
                self._ended.update({row.adapter_id: row for row in ended if isinstance(row, rows.Adapter)})
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

    async def job(self, job_id: str) -> rows.Job | None:
        """Of those that ended long ago none is asked for: a repeat of a request is in no record."""
        await trio.lowlevel.checkpoint()
        return self.present.job(job_id)

    async def job_of_key(self, model_id: str, key: str) -> rows.Job | None:
        """The first that came under its key is the one that is in the record."""
        await trio.lowlevel.checkpoint()
        return None

    async def sample_of_key(self, tenant: str, key: str) -> rows.Job | None:
        await trio.lowlevel.checkpoint()
        return None

    async def session_of_key(self, tenant: str, key: str) -> rows.Session | None:
        await trio.lowlevel.checkpoint()
        return None

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

    async def acceptance(self, job: rows.Job) -> JobAccepted:
        await trio.lowlevel.checkpoint()
        return self.present.acceptance(job.job_id) or store.acceptance(self._recording.journal, job)

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
        raise LookupError("a replay reads no tables")
