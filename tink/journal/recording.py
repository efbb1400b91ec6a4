"""What a worker has left behind, at one moment: its events, and the bodies that they name. Whoever audits
or replays reads this; a worker that runs meanwhile is not disturbed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from sqlalchemy import Connection

from tink.domain import rows
from tink.domain.events import Record
from tink.home import Home
from tink.journal import store
from tink.journal.bodies import Stored, decompressed, oldest, read_body, shelves, stored
from tink.journal.database import database
from tink.journal.reader import open_journal, open_snapshot


class Recording:
    """Made by `open_recording`. `journal` is a connection for queries.py; it blocks, as do the methods."""

    def __init__(self, journal: Connection, bodies: Connection, *, whole: bool) -> None:
        """`whole`: false for a part of a journal, from a bundle."""
        self.journal, self._whole = journal, whole
        self._shelves = shelves(journal, bodies)

    def records(self, after: int = 0, until: int | None = None) -> Iterator[Record]:
        """Every event behind `after`, in order, up to and with `until`. LookupError for one that is damaged
        or, in a whole journal, missing."""
        found = store.read_events(self.journal, after, until)
        return store.gapless(found, after) if self._whole else found

    def records_of(self, model: str, after: int = 0, until: int | None = None) -> Iterator[Record]:
        """Of these the ones that make what there is of a model: its rows, its session, its adapter's
        samplers and their samples. LookupError for one that is damaged; a missing one is not missed."""
        return store.read_events(self.journal, after, until, model=model)

    def request(self, job: rows.Job) -> bytes:
        """The request of a job as its client made it, decompressed. LookupError if it is not there any
        more, or never was a valid one."""
        accepted = store.acceptance(self.journal, job)
        if accepted.invalid is not None:
            raise LookupError(f"the request of {job.job_id} was not a valid one: {accepted.invalid}")
        if accepted.request is not None:
            return accepted.request.encode()
        return decompressed(self.body(str(accepted.body_sha256)), accepted.codec)

    def body(self, digest: str) -> bytes:
        """A request as it was received, or a result as it was sent. LookupError if it was pruned."""
        return read_body(self._shelves, digest)

    def stored(self, digests: Collection[str]) -> set[str]:
        """Those of these bodies that were not pruned."""
        return stored(self._shelves, digests)

    def oldest(self, before: float, after: Stored | None) -> list[Stored]:
        """A page of what was stored before `before`, the oldest first, behind `after`."""
        return oldest(self._shelves, before, after)


@contextmanager
def open_recording(home: Home) -> Iterator[Recording]:
    """StartupError, in one line, for what cannot be read."""
    # A body is stored before the event that names it: the journal's moment comes first.
    with open_journal(home) as journal, open_snapshot(database(home, "bodies")) as bodies:
        yield Recording(journal, bodies, whole=not home.bundle.exists())
