"""Every question that is put to the journal by whoever is not its writer, by name. They block: the worker
asks them from threads (Journal.read), commands on a connection of their own (reader.py). Answers are rows
of tink/domain."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import ColumnElement, Connection, Select, Table, and_, bindparam, func, or_, select

from tink.domain import retention, rows
from tink.domain.events import Record, TrainerStarted
from tink.domain.memory import RowId
from tink.domain.requests import MUTATING
from tink.domain.retention import Load
from tink.errors import StartupError
from tink.journal import schema, store
from tink.journal.database import batched
from tink.limits import SCANNED_ROWS

R = TypeVar("R", bound=rows.Row)

# As literals: SQLite takes the partial index of open jobs only for the very condition it was made with.
_IS_OPEN = schema.jobs.c.state.in_(
    bindparam("open", sorted(rows.OPEN), expanding=True, literal_execute=True)
)


# -- what people ask ------------------------------------------------------------------------------


def last_incarnation(connection: Connection) -> rows.Incarnation | None:
    query = select(schema.incarnations).order_by(schema.incarnations.c.number.desc()).limit(1)
    return next(iter(_rows(connection, query, rows.Incarnation)), None)


def count_events(connection: Connection) -> int:
    return store.last_seq(connection)


def newest_event_at(connection: Connection) -> float | None:
    """Seconds since the epoch."""
    events = schema.events
    found = connection.execute(select(events.c.at).order_by(events.c.seq.desc()).limit(1)).scalar()
    return None if found is None else float(found)


def count(connection: Connection, table: str) -> dict[str, int]:
    """How many rows of the table are in each state."""
    state = schema.metadata.tables[table].c.state
    query = select(state, func.count()).group_by(state).order_by(state)
    return {str(name): number for name, number in connection.execute(query)}


def at(connection: Connection, row_ids: Collection[RowId]) -> list[tuple[str, rows.Row]]:
    """The rows that are there, with their tables."""
    found: list[tuple[str, rows.Row]] = []
    for name in sorted({table for table, _ in row_ids}):
        table, (kind, (key,)) = schema.metadata.tables[name], rows.TABLES[name]
        for some in batched(sorted(id_ for table, id_ in row_ids if table == name)):
            query = select(table).where(table.c[key].in_(some))
            found += ((name, row) for row in _rows(connection, query, kind))
    return found


def sessions(connection: Connection, tenant: str) -> list[rows.Session]:
    """A tenant's, the newest first."""
    table = schema.sessions
    query = select(table).where(table.c.tenant == tenant).order_by(table.c.created_at.desc())
    return _rows(connection, query, rows.Session)


def session_of_key(connection: Connection, tenant: str, key: str) -> rows.Session | None:
    """The one that was made with that idempotency key."""
    table = schema.sessions
    query = select(table).where(table.c.tenant == tenant, table.c.idempotency_key == key)
    return next(iter(_rows(connection, query, rows.Session)), None)


def samplers_in(connection: Connection, session_id: str) -> list[str]:
    """The ids of a session's samplers, in order."""
    table = schema.samplers
    query = select(table.c.sampler_id).where(table.c.session_id == session_id)
    return list(connection.execute(query.order_by(table.c.sampling_seq_id)).scalars())


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


def model(connection: Connection, model_id: str) -> rows.Model | None:
    query = select(schema.models).where(schema.models.c.model_id == model_id)
    return next(iter(_rows(connection, query, rows.Model)), None)


def models(connection: Connection, model_ids: Collection[str]) -> list[rows.Model]:
    """Those of them that are the journal's."""
    table = schema.models
    batches = batched(sorted(model_ids))
    found = (
        _rows(connection, select(table).where(table.c.model_id.in_(some)), rows.Model) for some in batches
    )
    return [row for part in found for row in part]


def checkpoint(connection: Connection, checkpoint_id: str) -> rows.Checkpoint | None:
    query = select(schema.checkpoints).where(schema.checkpoints.c.checkpoint_id == checkpoint_id)
    return next(iter(_rows(connection, query, rows.Checkpoint)), None)


def snapshots(connection: Connection, model_id: str) -> list[rows.Snapshot]:
    """A model's live ones, the oldest first."""
    table = schema.snapshots
    query = select(table).where(table.c.model_id == model_id, table.c.state == "live")
    return _rows(connection, query.order_by(table.c.op_no), rows.Snapshot)


def exports(connection: Connection, model_id: str) -> list[rows.Adapter]:
    """A model's adapter versions, those without files any more included, in order."""
    table = schema.adapters
    query = select(table).where(table.c.model_id == model_id).order_by(table.c.version)
    return _rows(connection, query, rows.Adapter)


def adapter(connection: Connection, adapter_id: str) -> rows.Adapter | None:
    query = select(schema.adapters).where(schema.adapters.c.adapter_id == adapter_id)
    return next(iter(_rows(connection, query, rows.Adapter)), None)


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
    jobs = connection.execute(select(schema.jobs), execution_options={"yield_per": SCANNED_ROWS}).mappings()
    for job in (rows.Job(**row) for row in jobs):
        due |= dict.fromkeys(retention.bodies_needed([job], {}, covers, cutoffs), job.job_id)
    return due


def _cutoffs(connection: Connection) -> retention.Cutoffs:
    """The furthest that any pass over the bodies went."""
    table = schema.events
    query = select(table.c.data).where(table.c.kind == "bodies_pruned")
    submitted = finished = -math.inf
    for data in connection.execute(query).scalars():
        submitted = max(submitted, data["submitted_before"])
        finished = max(finished, data["finished_before"])
    return retention.Cutoffs(submitted, finished, adapters=-math.inf, damaged=-math.inf)


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


# -- what the worker asks beside its ledger ---------------------------------------------------------


def ops(connection: Connection, model_id: str, after: int, upto: int) -> list[rows.Job]:
    """A model's jobs with after < op_no <= upto, in order: what a redo applies again."""
    table = schema.jobs
    query = select(table).where(table.c.model_id == model_id, table.c.op_no > after, table.c.op_no <= upto)
    return _rows(connection, query.order_by(table.c.op_no), rows.Job)


def redo_ms(connection: Connection, model_id: str, after: int) -> float:
    """How long the model's operations behind op_no `after` ran."""
    table = schema.jobs
    query = select(func.coalesce(func.sum(table.c.run_ms), 0.0))
    query = query.where(table.c.model_id == model_id, table.c.op_no > after)
    return float(connection.execute(query).scalar_one())


def jobs_naming(connection: Connection, digests: Collection[str], ended_since: float) -> list[rows.Job]:
    """The jobs that have one of these bodies as their request, or as their result if they have ended since
    then: the same result may belong to thousands."""
    table = schema.jobs
    result = and_(table.c.result_sha256.in_(digests), table.c.finished_at >= ended_since)
    query = select(table).where(or_(table.c.body_sha256.in_(digests), result))
    return _rows(connection, query, rows.Job)


def named_bodies(connection: Connection, digests: Collection[str]) -> tuple[set[str], set[str]]:
    """Those of these that are requests of jobs, and those that are results."""
    columns = schema.jobs.c.body_sha256, schema.jobs.c.result_sha256
    found: tuple[set[str], set[str]] = set(), set()
    for some in batched(sorted(digests)):
        for column, names in zip(columns, found, strict=True):
            names.update(connection.execute(select(column).where(column.in_(some)).distinct()).scalars())
    return found


def named_directories(connection: Connection) -> dict[str, str]:
    """Every directory of the artifact folder that a row names: the table in which it does."""
    tables = schema.snapshots, schema.checkpoints, schema.adapters  # of a saved sampler both have it
    return {
        directory: table.name
        for table in tables
        for directory in connection.execute(select(table.c.directory)).scalars()
    }


def trained_with(connection: Connection, digests: Collection[str]) -> set[str]:
    """The models that have one of these bodies as a request of their operations."""
    table = schema.jobs
    found: set[str] = set()
    for some in batched(sorted(digests)):
        query = select(table.c.model_id).where(table.c.body_sha256.in_(some), table.c.op_no.is_not(None))
        found.update(connection.execute(query.distinct()).scalars())
    return found


def snapshotted_in(connection: Connection, directories: Collection[str]) -> set[str]:
    """The models that have a live snapshot in one of these."""
    table = schema.snapshots
    query = select(table.c.model_id, table.c.directory).where(table.c.state == "live")
    return {model_id for model_id, directory in connection.execute(query) if directory in directories}


def loads(connection: Connection) -> list[Load]:
    """Every saved state that was ever loaded into a model."""
    return _loads(connection)


def loads_behind(connection: Connection, covers: Mapping[str, int]) -> list[Load]:
    """Those into these models, and of each those behind an operation, if not more."""
    table = schema.jobs
    found: list[Load] = []
    for some in batched(sorted(covers)):
        # By both columns of their own index: by the first alone SQLite takes another, with all jobs in it.
        behind = table.c.op_no > min(covers[model] for model in some)
        found += _loads(connection, table.c.model_id.in_(some), behind)
    return found


def _loads(connection: Connection, *which: ColumnElement[bool]) -> list[Load]:
    table = schema.jobs
    query = select(table.c.model_id, table.c.op_no, table.c.directory)
    query = query.where(schema.LOADS, table.c.state == "done", *which)
    return [Load(*row) for row in connection.execute(query)]


def last_requests(connection: Connection, samplers: list[str]) -> dict[str, float]:
    """When each of these samplers had its last request; without those that never had one."""
    table = schema.jobs
    found: dict[str, float] = {}
    for some in batched(samplers):
        asked = table.c.sampler_id.in_(some)
        query = select(table.c.sampler_id, func.max(table.c.submitted_at)).where(asked)
        found |= {row[0]: row[1] for row in connection.execute(query.group_by(table.c.sampler_id))}
    return found


def adapter_directories(connection: Connection, adapters: Collection[str]) -> list[str]:
    table = schema.adapters
    found: list[str] = []
    for some in batched(sorted(adapters)):
        found += connection.execute(select(table.c.directory).where(table.c.adapter_id.in_(some))).scalars()
    return found


def placements(connection: Connection) -> list[tuple[rows.Adapter, str]]:
    """The adapter versions that servers have, as far as is known; and which has it."""
    table, adapters = schema.adapter_placements, schema.adapters
    query = select(adapters, table.c.replica).join(table, table.c.adapter_id == adapters.c.adapter_id)
    query = query.where(table.c.state == "loaded").order_by(adapters.c.adapter_id, table.c.replica)
    found = []
    for row in connection.execute(query).mappings():
        columns = dict(row)
        place = columns.pop("replica")
        found.append((rows.Adapter(**columns), place))
    return found


def damaged_snapshots(connection: Connection, since: float) -> list[str]:
    """The directories of snapshots that were found to be damaged since then."""
    table = schema.snapshots
    query = select(table.c.directory).where(schema.DAMAGED, table.c.dropped_at >= since)
    return list(connection.execute(query).scalars())


def last_end(connection: Connection) -> int:
    """The number of the last event that ended a checkpoint or a model; 0 if none did."""
    table = schema.events
    kinds = ("checkpoint_deleted", "model_removed")
    query = select(func.max(table.c.seq)).where(table.c.kind.in_(kinds))
    return int(connection.execute(query).scalar() or 0)


def job_of_key(connection: Connection, model_id: str, key: str) -> rows.Job | None:
    """A model's job, by what a repeat of it is known by."""
    table = schema.jobs
    query = select(table).where(table.c.model_id == model_id, table.c.key == key, schema.KEYED)
    return next(iter(_rows(connection, query, rows.Job)), None)


def sample_of_key(connection: Connection, tenant: str, key: str) -> rows.Job | None:
    """A tenant's sample, by what a repeat of it is known by."""
    table = schema.jobs
    query = select(table).where(table.c.tenant == tenant, table.c.key == key, schema.KEYED_SAMPLES)
    return next(iter(_rows(connection, query, rows.Job)), None)


def weights(connection: Connection, model_id: str) -> rows.Job | None:
    """The last accepted job that changes a model's weights, or saves them for samplers."""
    table = schema.jobs
    ops = table.c.op.in_([*sorted(MUTATING), "save_weights_for_sampler"])
    query = select(table).where(table.c.model_id == model_id, ops).order_by(table.c.seq_id.desc())
    return next(iter(_rows(connection, query.limit(1), rows.Job)), None)


def trainers(connection: Connection) -> list[str]:
    """The incarnations of the training servers that have answered, the last one last."""
    table = schema.events
    query = select(table.c.seq).where(table.c.kind == "trainer_started").order_by(table.c.seq)
    found = [store.event_of(connection, seq).event for seq in connection.execute(query).scalars().all()]
    return [event.incarnation for event in found if isinstance(event, TrainerStarted)]


# -- the inside -------------------------------------------------------------------------------------


def _samplers_of(model_id: str) -> Select[Any]:
    samplers, adapters = schema.samplers, schema.adapters
    return (
        select(samplers.c.sampler_id)
        .join(adapters, adapters.c.adapter_id == samplers.c.adapter_id)
        .where(adapters.c.model_id == model_id)
    )


def _rows(connection: Connection, query: Select[Any], kind: type[R]) -> list[R]:
    return list(store.read_rows(connection, query, kind))
