"""A worker with a leak in it: the soak must find it. Each mutant is put into a worker that runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import IO

from tink.domain.events import JobDone, Record
from tink.journal.journal import Journal

# What they never let go.
kept: list[object] = []


def keeps_bytes(journal: Journal) -> None:
    """A little memory, of each job."""
    journal.observers.append(lambda record: kept.append(bytes(30_000)) if _ends(record) else None)


def keeps_files(journal: Journal) -> None:
    """A file open, of every hundredth job."""

    def observe(record: Record) -> None:
        if _ends(record) and not record.seq % 100:
            opened: IO[bytes] = journal._home.journal.open("rb")
            kept.append(opened)

    journal.observers.append(observe)


def keeps_rows(journal: Journal) -> None:
    """Every session, model and sampler, in the ledger."""


def _ends(record: Record) -> bool:
    return isinstance(record.event, JobDone)


ALL: dict[str, Callable[[Journal], None]] = {
    "keeps-bytes": keeps_bytes,
    "keeps-files": keeps_files,
}
