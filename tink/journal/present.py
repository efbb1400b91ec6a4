"""What a worker has in memory of its journal: all that has not ended, and the jobs that ended last."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Set

import structlog

from tink.domain import memory, rows
from tink.domain.events import JobAccepted, Record
from tink.domain.ledger import Ledger
from tink.domain.memory import RowId
from tink.domain.numbers import Numbers
from tink.domain.projection import KEYS, Insert, Key, Update, project
from tink.journal import store
from tink.limits import RECENT_JOBS

log = structlog.get_logger()


class Present:
    """`ledger`: what is there already. Observers see each event before it has taken that in."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.observers: list[Callable[[Record], None]] = []
        self._acceptances: dict[str, JobAccepted] = {}  # of open jobs
        self._recent: OrderedDict[str, rows.Job] = OrderedDict()
        self._numbers: dict[str, Numbers] = {}  # of the samplers that were made since the start
        self._held: Counter[RowId] = Counter()  # what stays in memory, for so many

    def apply(self, record: Record) -> list[rows.Row]:
        """Takes an event in. Returns the rows that it has ended: they are not in `ledger` any more.
        LookupError if it cannot follow those before it."""
        for observe in self.observers:
            try:
                observe(record)
            except Exception:  # what is only told of must not stop the worker
                log.exception("observer failed", kind=record.event.__struct_config__.tag)
        if isinstance(record.event, JobAccepted):
            self._acceptances[str(record.subject.job_id)] = record.event
            if record.event.sampler_id in self._numbers:
                self._numbers[record.event.sampler_id].take(record.event.seq_id)
        changes = [change for change in project(record) if change.table in store.PRESENT]
        self.ledger.apply(changes)
        for change in changes:
            if isinstance(change, Insert) and isinstance(change.row, rows.Sampler):
                self._numbers[change.row.sampler_id] = Numbers()
        updates = [change for change in changes if isinstance(change, Update)]
        return [row for one in updates if (row := self._forgotten_if_ended(one.table, one.key)) is not None]

    def _forgotten_if_ended(self, table: str, key: Key) -> rows.Row | None:
        row: rows.Row = self.ledger.tables[table][key]
        if not row.ended:
            return None
        self.ledger.forget(table, key)
        if isinstance(row, rows.Job):
            self._acceptances.pop(row.job_id, None)
            self._recent[row.job_id] = row
            while len(self._recent) > RECENT_JOBS:
                self._recent.popitem(last=False)
        return row

    def job(self, job_id: str) -> rows.Job | None:
        """One that is open, or has ended lately."""
        return self.ledger.jobs.get((job_id,)) or self._recent.get(job_id)

    def has_no_job(self, job_id: str) -> bool:
        """Whether there is none of that id, nor was, for certain."""
        sampler_id, _, number = job_id.rpartition(":")
        numbers = self._numbers.get(sampler_id)
        return numbers is not None and number.isdecimal() and numbers.is_free(int(number))

    def acceptance(self, job_id: str) -> JobAccepted | None:
        """Of a job that is open, if it was accepted since the start."""
        return self._acceptances.get(job_id)

    # -- what need not be there ---------------------------------------------------------------------

    def hold(self, row_ids: Collection[RowId]) -> None:
        """What is in memory of that stays there until it is released."""
        self._held.update(row_ids)

    def release(self, row_ids: Collection[RowId]) -> None:
        for row_id in row_ids:
            self._held[row_id] -= 1
            if not self._held[row_id]:
                del self._held[row_id]

    def lacking(self, row_ids: Collection[RowId]) -> list[RowId]:
        """Those that are not in memory."""
        return [(table, id_) for table, id_ in row_ids if (id_,) not in self.ledger.tables[table]]

    def recall(self, found: Iterable[tuple[str, rows.Row]]) -> None:
        """Rows that were lacking, by their tables, as the journal has them."""
        for table, row in found:
            # Another one may have had it read meanwhile, and things have happened to it since.
            if KEYS[table](row) not in self.ledger.tables[table]:
                self.ledger.put(table, row)

    def forget(self, busy: Set[RowId]) -> None:
        """What has ended leaves the memory, unless something there goes back to it, or it is held, or
        `busy`."""
        for table, id_ in list(memory.forgettable(self.ledger, self._held.keys() | busy)):
            self.ledger.forget(table, (id_,))
            if table == "samplers":
                self._numbers.pop(id_, None)
