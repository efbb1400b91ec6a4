"""The state at a point of a journal, and what differs between two: folds of its events."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from tink.domain import rows
from tink.domain.ledger import Difference, Ledger, fold
from tink.errors import NotFound
from tink.journal.recording import Recording

Tables = dict[str, list[rows.Row]]


class Scope(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for; None: everything. `model`: its rows, its session's, and its samplers' with their
    samples. `job`: the job's, and what it saved or exported."""

    model: str | None = None
    job: str | None = None
    table: str | None = None

    def has(self, table: str, row: rows.Row, ledger: Ledger) -> bool:
        """`ledger`: where the rows are that it belongs to."""
        return (
            self.table in (None, table)
            and (self.model is None or _is_of_model(row, self.model, ledger))
            and (self.job is None or self.job in _jobs_of(row))
        )


def at(recording: Recording, scope: Scope, seq: int) -> Ledger:
    """The state behind an event. Of a scope with a model only that model's part is made, from few events.
    Blocks. LookupError for an event that is damaged or missing."""
    if scope.model is not None:
        return fold(recording.records_of(scope.model, until=seq))
    return fold(recording.records(until=seq))


def select(ledger: Ledger, scope: Scope, seq: int) -> Tables:
    """The rows of the scope, by table, each in the order in which they were made. NotFound for a model or a
    job that is not there behind event `seq`."""
    _check_known(ledger, scope, seq)
    return {
        table: [row for row in found.values() if scope.has(table, row, ledger)]
        for table, found in ledger.tables.items()
        if scope.table in (None, table)
    }


def difference(recording: Recording, scope: Scope, old: int, new: int) -> list[Difference]:
    """What makes the state behind event `new` of that behind event `old`, which may be the later one.
    Raises as `at` and `select` do."""
    first, last = sorted((old, new))
    ledger = at(recording, scope, first)
    if scope.model is not None:
        between = recording.records_of(scope.model, first, last)
    else:
        between = recording.records(first, last)
    found = ledger.follow(between)
    _check_known(ledger, scope, last)
    # No row ever goes: each is there behind the later event.
    kept = [one for one in found if one.new is not None and scope.has(one.table, one.new, ledger)]
    return kept if old <= new else [one.reversed() for one in kept]


def _check_known(ledger: Ledger, scope: Scope, seq: int) -> None:
    for what, id_, table in (("model", scope.model, ledger.models), ("job", scope.job, ledger.jobs)):
        if id_ is not None and (id_,) not in table:
            raise NotFound(f"there is no {what} {id_[:200]!r} behind event {seq}")


def _is_of_model(row: rows.Row, model: str, ledger: Ledger) -> bool:
    match row:
        case rows.Session():
            found = ledger.models.get((model,))
            return found is not None and found.session_id == row.session_id
        case rows.Job(sampler_id=str(sampler_id)):
            sampler = ledger.samplers.get((sampler_id,))
            return sampler is not None and _is_of_model(sampler, model, ledger)
        case rows.Sampler() | rows.AdapterPlacement():
            adapter = ledger.adapters.get((row.adapter_id,))
            return adapter is not None and adapter.model_id == model
        case rows.Incarnation() | rows.Usage():
            return False  # of everybody
    model_id: str | None = getattr(row, "model_id")  # noqa: B009  every other row has one
    return model_id == model


def _jobs_of(row: rows.Row) -> Iterator[str]:
    match row:
        case rows.Job() | rows.Adapter():
            yield row.job_id
        case rows.Checkpoint():
            yield row.checkpoint_id
