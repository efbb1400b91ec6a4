"""Every question that the commands put to the journal, by name. Answers are the rows of tink/domain."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import ColumnElement, Connection, Select, Table, bindparam, func, or_, select

from tink.domain import retention, rows
from tink.domain.events import Record
from tink.errors import StartupError
from tink.journal import schema, store

R = TypeVar("R", bound=rows.Row)

# As literals: SQLite takes the partial index of open jobs only for the very condition it was made with.
_IS_OPEN = schema.jobs.c.state.in_(
    bindparam("open", sorted(rows.OPEN), expanding=True, literal_execute=True)
)


def last_incarnation(connection: Connection) -> rows.Incarnation | None:
    query = select(schema.incarnations).order_by(schema.incarnations.c.number.desc()).limit(1)
    return next(iter(_rows(connection, query, rows.Incarnation)), None)


def count_events(connection: Connection) -> int:
    return store.last_seq(connection)


def count(connection: Connection, table: str) -> dict[str, int]:
    """How many rows of the table are in each state."""
    state = schema.metadata.tables[table].c.state
    query = select(state, func.count()).group_by(state).order_by(state)
    return {str(name): number for name, number in connection.execute(query)}


class OpenJobs(NamedTuple):
    op: str
    state: str
    number: int
    oldest: float


def open_jobs(connection: Connection) -> list[OpenJobs]:
    """By operation and state; `oldest` is when the first of them was submitted."""
    jobs = schema.jobs
    query = select(jobs.c.op, jobs.c.state, func.count(), func.min(jobs.c.submitted_at)).where(_IS_OPEN)
    grouped = query.group_by(jobs.c.op, jobs.c.state).order_by(jobs.c.op, jobs.c.state)
    return [OpenJobs(*row) for row in connection.execute(grouped)]


def latest_models(connection: Connection, limit: int) -> list[rows.Model]:
    newest = schema.models.c.last_request_at.desc()
    return _rows(connection, select(schema.models).order_by(newest).limit(limit), rows.Model)


def latest_sessions(connection: Connection, limit: int) -> list[rows.Session]:
    newest = schema.sessions.c.created_at.desc()
    return _rows(connection, select(schema.sessions).order_by(newest).limit(limit), rows.Session)


def jobs(
    connection: Connection,
    *,
    limit: int,
    state: str | None = None,
    op: str | None = None,
    model_id: str | None = None,
    session_id: str | None = None,
    since: float | None = None,
) -> list[rows.Job]:
    """The newest first. `state` is one of the five, or `open`. The jobs of a model are those that train
    it and the samples of its adapters."""
    table = schema.jobs
    query = select(table)
    if state == "open":
        query = query.where(_IS_OPEN)
    elif state is not None:
        query = query.where(table.c.state == state)
    if op is not None:
        query = query.where(table.c.op == op)
    if model_id is not None:
        query = query.where(
            or_(table.c.model_id == model_id, table.c.sampler_id.in_(_samplers_of(model_id)))
        )
    if session_id is not None:
        query = query.where(table.c.session_id == session_id)
    if since is not None:
        query = query.where(table.c.submitted_at >= since)
    newest = [table.c.submitted_at.desc(), table.c.accepted_seq.desc()]
    if state == "open":
        newest = newest[1:]  # the same order, and the index of open jobs has it
    return _rows(connection, query.order_by(*newest).limit(limit), rows.Job)


def job(connection: Connection, job_id: str) -> rows.Job | None:
    query = select(schema.jobs).where(schema.jobs.c.job_id == job_id)
    return next(iter(_rows(connection, query, rows.Job)), None)


def events_of(connection: Connection, job_id: str) -> list[Record]:
    """In order. StartupError if one is damaged."""
    table = schema.events
    query = select(table.c.seq).where(table.c.job_id == job_id).order_by(table.c.seq)
    try:
        return [store.event_of(connection, seq) for seq in connection.execute(query).scalars().all()]
    except LookupError as error:
        raise StartupError(f"{error}: 'tink db check' tells more") from error


def bodies_due(connection: Connection) -> dict[str, str]:
    """sha256 -> job, of each body that must be there: retention has not pruned it."""
    ledger = store.read_present(connection)
    covers, cutoffs = retention.covered(ledger), _cutoffs(connection)
    due: dict[str, str] = {}
    jobs = connection.execution_options(yield_per=1000).execute(select(schema.jobs)).mappings()
    for job in (rows.Job(**row) for row in jobs):
        due |= dict.fromkeys(retention.bodies_needed([job], covers, cutoffs), job.job_id)
    return due


def _cutoffs(connection: Connection) -> retention.Cutoffs:
    """The furthest that any pass went."""
    table = schema.events
    query = select(table.c.data).where(table.c.kind == "bodies_pruned")
    submitted = finished = -math.inf
    for data in connection.execute(query).scalars():
        submitted = max(submitted, data["submitted_before"])
        finished = max(finished, data["finished_before"])
    return retention.Cutoffs(submitted, finished)


class Sizes(NamedTuple):
    """Bytes, of what is live. Sampler weights are adapters, whether they have a name or not."""

    checkpoints: int
    adapters: int
    snapshots: int


def sizes(connection: Connection) -> Sizes:
    def total(table: Table, *conditions: ColumnElement[bool]) -> int:
        query = select(func.coalesce(func.sum(table.c.size_bytes), 0))
        return int(connection.execute(query.where(table.c.state == "live", *conditions)).scalar_one())

    checkpoints = schema.checkpoints
    return Sizes(
        total(checkpoints, checkpoints.c.adapter_id.is_(None)),
        total(schema.adapters),
        total(schema.snapshots),
    )


def _samplers_of(model_id: str) -> Select[Any]:
    samplers, adapters = schema.samplers, schema.adapters
    return (
        select(samplers.c.sampler_id)
        .join(adapters, adapters.c.adapter_id == samplers.c.adapter_id)
        .where(adapters.c.model_id == model_id)
    )


def _rows(connection: Connection, query: Select[Any], kind: type[R]) -> list[R]:
    return list(store.read_rows(connection, query, kind))
