"""A worker with a leak in it: the soak must find it. Each mutant is put into a worker that runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tink.domain.events import JobDone, Record
from tink.journal.journal import Journal

# What they never let go.
kept: list[object] = []


def keeps_bytes(journal: Journal) -> None:
    """A little memory, of each job."""
    _at_each_end(journal, 1, lambda: bytes(100_000))


def keeps_files(journal: Journal) -> None:
    """An open file, of every tenth job."""
    _at_each_end(journal, 10, Path(__file__).open)


def keeps_rows(journal: Journal) -> None:
    """In memory, of sessions, models and samplers that have ended."""
    assert callable(journal.present.forget)
    setattr(journal.present, "forget", lambda busy: None)  # noqa: B010  it is a method


def _at_each_end(journal: Journal, every: int, make: Callable[[], object]) -> None:
    ends = 0

    def observe(record: Record) -> None:
        nonlocal ends
        if isinstance(record.event, JobDone):
            ends += 1
            if not ends % every:
                kept.append(make())

    journal.present.observers.append(observe)


ALL: dict[str, Callable[[Journal], None]] = {
    "keeps-bytes": keeps_bytes,
    "keeps-files": keeps_files,
    "keeps-rows": keeps_rows,
}
