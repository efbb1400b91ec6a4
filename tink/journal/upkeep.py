"""What retention asks the journal that is not in its ledger: the blocking half, called from threads."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from sqlalchemy import Connection, and_, func, or_, select

from tink.domain import rows
from tink.domain.events import TrainerStarted
from tink.domain.retention import Load
from tink.journal import schema, store
from tink.limits import SQL_KEYS


def jobs_naming(connection: Connection, digests: Collection[str], ended_since: float) -> list[rows.Job]:
    """The jobs that have one of these bodies as their request, or as their result if they have ended since
    then: the same result may belong to thousands."""
    table = schema.jobs
    result = and_(table.c.result_sha256.in_(digests), table.c.finished_at >= ended_since)
    query = select(table).where(or_(table.c.body_sha256.in_(digests), result))
    return [rows.Job(**row) for row in connection.execute(query).mappings()]


def loads(connection: Connection) -> list[Load]:
    """Every saved state that was ever loaded into a model."""
    table = schema.jobs
    query = select(table.c.model_id, table.c.op_no, table.c.directory)
    return [Load(*row) for row in connection.execute(query.where(schema.LOADS, table.c.state == "done"))]


def last_requests(connection: Connection, samplers: list[str]) -> dict[str, float]:
    """When each of these samplers had its last request; without those that never had one."""
    table = schema.jobs
    found: dict[str, float] = {}
    for some in _batched(samplers):
        asked = table.c.sampler_id.in_(some)
        query = select(table.c.sampler_id, func.max(table.c.submitted_at)).where(asked)
        found |= {row[0]: row[1] for row in connection.execute(query.group_by(table.c.sampler_id))}
    return found


def adapter_directories(connection: Connection, adapters: Collection[str]) -> list[str]:
    table = schema.adapters
    found: list[str] = []
    for some in _batched(sorted(adapters)):
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


def unloading(connection: Connection, model_id: str) -> str:
    """The job that has unloaded a model."""
    table = schema.jobs
    query = select(table.c.job_id).where(table.c.model_id == model_id, table.c.op == "unload_model")
    done = query.where(table.c.state == "done").order_by(table.c.seq_id.desc()).limit(1)
    return str(connection.execute(done).scalar_one())


def trainers(connection: Connection) -> list[str]:
    """The incarnations of the training servers that have answered, the last one last."""
    table = schema.events
    query = select(table.c.seq).where(table.c.kind == "trainer_started").order_by(table.c.seq)
    found = [store.event_of(connection, seq).event for seq in connection.execute(query).scalars().all()]
    return [event.incarnation for event in found if isinstance(event, TrainerStarted)]


def _batched(keys: list[str]) -> Iterator[list[str]]:
    """As many of them at a time as one question may have."""
    for start in range(0, len(keys), SQL_KEYS):
        yield keys[start : start + SQL_KEYS]
