"""From an event to the rows it changes: one definition with two interpreters. The journal writes the
changes to its tables in the event's own transaction; the `Ledger` of ledger.py applies them in memory. So
the fold of the events equals the tables by construction; that it does is checked, the end of it at every
start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import cache, singledispatch
from operator import attrgetter
from typing import Any, cast

import msgspec

from tink.domain import events, rows
from tink.domain.events import AnyEvent, Record

Key = tuple[Any, ...]


def _key_of(columns: tuple[str, ...]) -> Callable[[rows.Row], Key]:
    get = attrgetter(*columns)
    return (lambda row: (get(row),)) if len(columns) == 1 else get


# table -> the primary key of one of its rows.
KEYS: dict[str, Callable[[rows.Row], Key]] = {
    table: _key_of(columns) for table, (_, columns) in rows.TABLES.items()
}


class _OfRow(msgspec.Struct, frozen=True):
    table: str
    row: rows.Row

    @property
    def key(self) -> Key:
        return KEYS[self.table](self.row)


class Insert(_OfRow, frozen=True):
    pass


class Update(msgspec.Struct, frozen=True):
    table: str
    key: Key
    values: dict[str, Any]
    # Whether the row must not have ended: of what happens once.
    open: bool = False


class Upsert(_OfRow, frozen=True):
    pass


class Add(_OfRow, frozen=True):
    """To the row of that key, or to none: the sums of the table grow by the row's, and what else it says
    takes the place of what was there."""


Change = Insert | Update | Upsert | Add


def project(record: Record) -> list[Change]:
    """The changes of one event, in order. Depends on nothing but the record."""
    return list(_changes_of(type(record.event))(record.event, record))


@singledispatch
def _changes(event: AnyEvent, record: Record) -> Iterator[Change]:
    """Most events are history only: no projection changes."""
    return iter(())


# A fold asks for each event, and there are few kinds: a generic function's own look-up takes as long as all
# the rest of it.
_changes_of = cache(_changes.dispatch)


@_changes.register
def _(event: events.IncarnationStarted, record: Record) -> Iterator[Change]:
    yield Insert(
        "incarnations",
        rows.Incarnation(
            number=event.number,
            boot_id=event.boot_id,
            version=event.version,
            settings_digest=event.settings_digest,
            started_at=record.at,
        ),
    )


@_changes.register
def _(event: events.IncarnationStopped, record: Record) -> Iterator[Change]:
    values = {"stopped_at": record.at, "stop_reason": event.reason}
    yield Update("incarnations", (event.number,), values)


@_changes.register
def _(event: events.SessionCreated, record: Record) -> Iterator[Change]:
    yield Insert(
        "sessions",
        rows.Session(
            session_id=cast(str, record.subject.session_id),
            tenant=cast(str, record.subject.tenant),
            tags=event.tags,
            user_metadata=event.user_metadata,
            sdk_version=event.sdk_version,
            project_id=event.project_id,
            display_name=event.display_name,
            idempotency_key=event.idempotency_key,
            created_at=record.at,
        ),
    )


@_changes.register
def _(event: events.SessionFinished, record: Record) -> Iterator[Change]:
    values = {"state": "finished", "finished_at": record.at, "finish_reason": event.reason}
    yield Update("sessions", (record.subject.session_id,), values)


@_changes.register
def _(event: events.SessionMoved, record: Record) -> Iterator[Change]:
    yield Update("sessions", (record.subject.session_id,), {"project_id": event.project_id})


@_changes.register
def _(event: events.JobAccepted, record: Record) -> Iterator[Change]:
    who = record.subject
    yield Insert(
        "jobs",
        rows.Job(
            job_id=cast(str, who.job_id),
            tenant=cast(str, who.tenant),
            op=event.op,
            session_id=who.session_id,
            model_id=who.model_id,
            sampler_id=event.sampler_id,
            seq_id=event.seq_id,
            key=event.key,
            model_seq_id=event.model_seq_id,
            accepted_seq=record.seq,
            submitted_at=record.at,
            body_sha256=event.body_sha256,
            body_bytes=event.body_bytes,
            codec=event.codec,
            seed=event.seed,
            num_samples=event.num_samples,
        ),
    )
    if event.model_seq_id is not None:
        yield Insert(
            "models",
            rows.Model(
                model_id=cast(str, who.model_id),
                tenant=cast(str, who.tenant),
                session_id=cast(str, who.session_id),
                model_seq_id=event.model_seq_id,
                created_at=record.at,
                last_request_at=record.at,
            ),
        )
    elif who.model_id is not None:
        yield Update("models", (who.model_id,), {"last_request_at": record.at})


@_changes.register
def _(event: events.JobStarted, record: Record) -> Iterator[Change]:
    values = {
        "state": "running",
        "attempts": event.attempt,
        "backend": event.backend,
        "op_no": event.op_no,
        "directory": event.directory,
        "started_at": record.at,
        "queue_ms": event.queue_ms,
    }
    yield Update("jobs", (record.subject.job_id,), values)
    if event.op_no is not None and event.seq_id is not None and event.attempt == 1:
        numbers = {"op_no": event.op_no, "next_seq": event.seq_id + 1}
        yield Update("models", (record.subject.model_id,), numbers)


@_changes.register
def _(event: events.JobDone, record: Record) -> Iterator[Change]:
    values = {
        "state": "done",
        "finished_at": record.at,
        "tokens_in": event.tokens_in,
        "tokens_out": event.tokens_out,
        "loss_sum": event.loss_sum,
        "run_ms": event.run_ms,
        "idle_ms": event.idle_ms,
        "result": event.result,
        "result_sha256": event.result_sha256,
        "result_bytes": event.result_bytes,
        "step": event.step,
    }
    if event.queue_ms is not None:
        values["queue_ms"] = event.queue_ms
    who = record.subject
    yield Update("jobs", (who.job_id,), values, open=True)
    if who.model_id is not None:
        yield _used(record, done=1, training_tokens=event.tokens_in, training_ms=event.run_ms)
    else:
        yield _used(
            record,
            done=1,
            prompt_tokens=event.tokens_in,
            sampled_tokens=event.tokens_out,
            sampling_ms=event.run_ms,
        )
    if event.step is not None:
        yield from _stepped(event, event.step, record)


def _stepped(event: events.JobDone, step: int, record: Record) -> Iterator[Change]:
    who = record.subject
    row = rows.Step(
        model_id=cast(str, who.model_id),
        step=step,
        tenant=cast(str, who.tenant),
        jobs=1,
        updates=0,
        tokens_in=event.tokens_in,
        loss_sum=event.loss_sum or 0.0,
        run_ms=event.run_ms,
    )
    if event.learning_rate is not None:
        row.updates = 1
        row.job_id = who.job_id
        row.learning_rate = event.learning_rate
        row.grad_norm = event.metrics.get("grad_norm")
        row.finished_at = record.at
        yield Update("models", (who.model_id,), {"steps": step})
    yield Add("steps", row)


def _used(record: Record, **sums: Any) -> Change:
    day = datetime.fromtimestamp(record.at, UTC).date().isoformat()
    return Add("usage", rows.Usage(tenant=cast(str, record.subject.tenant), day=day, **sums))


@_changes.register
def _(event: events.JobFailed, record: Record) -> Iterator[Change]:
    values = {
        "state": "failed",
        "finished_at": record.at,
        "error_category": event.category,
        "error": event.error,
    }
    yield Update("jobs", (record.subject.job_id,), values, open=True)
    yield _used(record, failed=1)
    if record.subject.model_id is not None and event.seq_id is not None:
        changed: dict[str, Any] = {"next_seq": event.seq_id + 1}
        if event.seq_id == 0:  # the job that was to make the model
            changed["state"] = "failed"
        yield Update("models", (record.subject.model_id,), changed)


@_changes.register
def _(event: events.JobCancelled, record: Record) -> Iterator[Change]:
    values = {"state": "cancelled", "finished_at": record.at}
    yield Update("jobs", (record.subject.job_id,), values, open=True)
    yield _used(record, cancelled=1)


@_changes.register
def _(event: events.SeqSkipped, record: Record) -> Iterator[Change]:
    yield Update("models", (record.subject.model_id,), {"next_seq": event.last + 1})


@_changes.register
def _(event: events.ModelCreated, record: Record) -> Iterator[Change]:
    values = {**msgspec.structs.asdict(event), "state": "live"}
    yield Update("models", (record.subject.model_id,), values)


@_changes.register
def _(event: events.ModelRemoved, record: Record) -> Iterator[Change]:
    yield Update("models", (record.subject.model_id,), {"state": "removed"})


@_changes.register
def _(event: events.CheckpointSaved, record: Record) -> Iterator[Change]:
    yield Insert(
        "checkpoints",
        rows.Checkpoint(
            checkpoint_id=cast(str, record.subject.job_id),
            tenant=cast(str, record.subject.tenant),
            model_id=cast(str, record.subject.model_id),
            kind=event.checkpoint_kind,
            name=event.name,
            directory=event.directory,
            size_bytes=event.size_bytes,
            adapter_id=record.subject.adapter_id,
            step=event.step,
            user_metadata=event.user_metadata,
            created_at=record.at,
            expires_at=event.expires_at,
        ),
    )


@_changes.register
def _(event: events.CheckpointForked, record: Record) -> Iterator[Change]:
    yield Insert(
        "checkpoints",
        rows.Checkpoint(
            checkpoint_id=event.checkpoint_id,
            tenant=cast(str, record.subject.tenant),
            model_id=cast(str, record.subject.model_id),
            kind="weights",
            name=event.name,
            directory=event.directory,
            size_bytes=event.size_bytes,
            adapter_id=None,
            step=event.step,
            user_metadata={"fork": "; ".join(event.edits)} if event.edits else {},
            created_at=record.at,
            expires_at=None,
        ),
    )


@_changes.register
def _(event: events.CheckpointChanged, record: Record) -> Iterator[Change]:
    values = {"public": event.public, "expires_at": event.expires_at}
    yield Update("checkpoints", (event.checkpoint_id,), values)


@_changes.register
def _(event: events.CheckpointDeleted, record: Record) -> Iterator[Change]:
    values = {"state": event.reason, "deleted_at": record.at}
    yield Update("checkpoints", (event.checkpoint_id,), values)


@_changes.register
def _(event: events.AdapterExported, record: Record) -> Iterator[Change]:
    yield Insert(
        "adapters",
        rows.Adapter(
            adapter_id=cast(str, record.subject.adapter_id),
            tenant=cast(str, record.subject.tenant),
            model_id=cast(str, record.subject.model_id),
            version=event.version,
            job_id=cast(str, record.subject.job_id),
            directory=event.directory,
            size_bytes=event.size_bytes,
            files=event.files,
            step=event.step,
            created_at=record.at,
        ),
    )
    yield Update("models", (record.subject.model_id,), {"versions": event.version})


@_changes.register
def _(event: events.AdapterDeleted, record: Record) -> Iterator[Change]:
    values = {"state": event.reason, "deleted_at": record.at}
    yield Update("adapters", (record.subject.adapter_id,), values)


@_changes.register
def _(event: events.AdapterPlaced, record: Record) -> Iterator[Change]:
    yield Upsert(
        "adapter_placements",
        rows.AdapterPlacement(
            adapter_id=cast(str, record.subject.adapter_id),
            replica=cast(str, record.subject.replica),
            state=event.state,
            changed_at=record.at,
        ),
    )


@_changes.register
def _(event: events.SnapshotTaken, record: Record) -> Iterator[Change]:
    yield Insert(
        "snapshots",
        rows.Snapshot(
            snapshot_id=event.snapshot_id,
            tenant=cast(str, record.subject.tenant),
            model_id=cast(str, record.subject.model_id),
            op_no=event.op_no,
            directory=event.directory,
            size_bytes=event.size_bytes,
            created_at=record.at,
        ),
    )


@_changes.register
def _(event: events.SnapshotDropped, record: Record) -> Iterator[Change]:
    values = {"state": event.reason, "dropped_at": record.at}
    yield Update("snapshots", (event.snapshot_id,), values)


@_changes.register
def _(event: events.SamplerCreated, record: Record) -> Iterator[Change]:
    yield Insert(
        "samplers",
        rows.Sampler(
            sampler_id=event.sampler_id,
            tenant=cast(str, record.subject.tenant),
            session_id=cast(str, record.subject.session_id),
            sampling_seq_id=event.sampling_seq_id,
            base_model=event.base_model,
            model_path=event.model_path,
            adapter_id=record.subject.adapter_id,
            created_at=record.at,
        ),
    )
