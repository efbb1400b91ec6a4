"""A walk through a journal, event by event, with breakpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, cast, get_args

import msgspec

from tink.domain.events import KINDS, Record, kind_of
from tink.domain.ledger import Difference, Ledger
from tink.domain.projection import project
from tink.errors import UserError
from tink.journal.recording import Recording

What = Literal["model", "job", "kind"]


class Breakpoint(msgspec.Struct, frozen=True):
    """Any event of a model, of a job, or of a kind."""

    what: What
    value: str

    def __str__(self) -> str:
        return f"{self.what}={self.value}"

    def hits(self, record: Record) -> bool:
        match self.what:
            case "model":
                return record.subject.model_id == self.value
            case "job":
                return record.subject.job_id == self.value
            case "kind":
                return kind_of(record.event) == self.value


def parse_breakpoint(text: str) -> Breakpoint:
    """UserError for what is none."""
    what, _, value = text.partition("=")
    if what not in get_args(What) or not value:
        raise UserError(f"{text[:80]!r} is no breakpoint: model=ID, job=ID or kind=KIND is one")
    if what == "kind" and value not in KINDS:
        raise UserError(f"{value[:80]!r} is no kind of event: {', '.join(sorted(KINDS))} are")
    return Breakpoint(cast(What, what), value)


class Step(msgspec.Struct, frozen=True):
    """One event, and what it changed. The rows are the ledger's own: good until the next step."""

    record: Record
    changes: list[Difference]


class Walk:
    """Behind event `seq` of the recording's first `last`, with the `ledger` there; it begins before the
    first. It blocks. LookupError for an event that is damaged or missing."""

    def __init__(self, recording: Recording, last: int) -> None:
        self.last = last
        self._recording = recording
        self._restart()

    def _restart(self) -> None:
        self.seq = 0
        self.ledger = Ledger()
        self._records: Iterator[Record] = self._recording.records(until=self.last)

    def close(self) -> None:
        """Before the recording is: its events may be read to the middle."""
        self._records = iter(())

    def step(self) -> Step | None:
        """None at the end."""
        record = next(self._records, None)
        return None if record is None else self._taken(record)

    def run(self, breakpoints: Sequence[Breakpoint]) -> Step | None:
        """Up to and with the next event that one of them hits; None if that was none, up to the end."""
        for record in self._records:
            if any(point.hits(record) for point in breakpoints):
                return self._taken(record)
            self._pass(record)
        return None

    def go(self, seq: int) -> None:
        """Behind event `seq`; backwards is from the start again."""
        if seq < self.seq:
            self._restart()
        while self.seq < seq:
            self._pass(next(self._records))

    def _taken(self, record: Record) -> Step:
        self.seq = record.seq
        return Step(record, self.ledger.follow([record]))

    def _pass(self, record: Record) -> None:
        self.seq = record.seq
        self.ledger.apply(project(record))
