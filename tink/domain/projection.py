"""From an event to the rows it changes: one definition with two interpreters. The journal writes the
changes to its tables in the event's own transaction; `Ledger` applies them in memory. So the fold of
the events equals the tables by construction; that it does is checked, the end of it at every start."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from copy import copy
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
_KEYS: dict[str, Callable[[rows.Row], Key]] = {
    table: _key_of(columns) for table, (_, columns) in rows.TABLES.items()
}
# table -> its place among them.
_ORDER = {table: place for place, table in enumerate(rows.TABLES)}


class _OfRow(msgspec.Struct, frozen=True):
    table: str
    row: rows.Row

    @property
    def key(self) -> Key:
        return _KEYS[self.table](self.row)


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


class Difference(msgspec.Struct, frozen=True):
    """A row of which two ledgers do not say the same. `old` is None where it is made, `new` where it is
    gone."""

    table: str
    key: Key
    old: rows.Row | None
    new: rows.Row | None

    @property
    def columns(self) -> dict[str, tuple[Any, Any]]:
        """What has changed in a row that is in both: column -> (old, new)."""
        if self.old is None or self.new is None:
            return {}
        both = (
            (name, getattr(self.old, name), getattr(self.new, name)) for name in self.old.__struct_fields__
        )
        return {name: (old, new) for name, old, new in both if old != new}

    def reversed(self) -> Difference:
        """The way back."""
        return Difference(self.table, self.key, self.new, self.old)


class Ledger:
    """The projections in memory: each table is primary key -> row."""

    def __init__(self) -> None:
        self.incarnations: dict[Key, rows.Incarnation] = {}
        self.sessions: dict[Key, rows.Session] = {}
        self.models: dict[Key, rows.Model] = {}
        self.jobs: dict[Key, rows.Job] = {}
        self.samplers: dict[Key, rows.Sampler] = {}
        self.adapters: dict[Key, rows.Adapter] = {}
        self.adapter_placements: dict[Key, rows.AdapterPlacement] = {}
        self.checkpoints: dict[Key, rows.Checkpoint] = {}
        self.snapshots: dict[Key, rows.Snapshot] = {}
        self.steps: dict[Key, rows.Step] = {}
        self.usage: dict[Key, rows.Usage] = {}
        # The same, by the tables' names.
        self.tables: dict[str, dict[Key, Any]] = {name: getattr(self, name) for name in rows.TABLES}
        # (model, kind, name) -> the checkpoint that lives there, or lived there last.
        self._addresses: dict[Key, rows.Checkpoint] = {}
        # By adapter version: a run makes one with each of its steps, and most of those are gone.
        self._samplers_of: defaultdict[str, list[rows.Sampler]] = defaultdict(list)
        # (tenant, idempotency key) -> the session that was made with it. They are never forgotten.
        self._sessions_of: dict[Key, rows.Session] = {}

    def checkpoint_at(self, model_id: str, kind: str, name: str) -> rows.Checkpoint | None:
        """The live checkpoint of that address."""
        found = self._addresses.get((model_id, kind, name))
        return found if found is not None and found.state == "live" else None

    def session_of(self, tenant: str, idempotency_key: str) -> rows.Session | None:
        return self._sessions_of.get((tenant, idempotency_key))

    def samplers_of(self, adapter_id: str) -> Iterable[rows.Sampler]:
        """Those of an adapter version, and of a session that is open."""
        samplers = self._samplers_of.get(adapter_id, ())
        return (one for one in samplers if self.sessions[(one.session_id,)].state == "open")

    def put(self, table: str, row: rows.Row) -> None:
        self.tables[table][_KEYS[table](row)] = row
        if isinstance(row, rows.Checkpoint):
            address = (row.model_id, row.kind, row.name)
            if row.state == "live" or address not in self._addresses:
                self._addresses[address] = row
        elif isinstance(row, rows.Sampler) and row.adapter_id is not None:
            self._samplers_of[row.adapter_id].append(row)
        elif isinstance(row, rows.Session) and row.idempotency_key is not None:
            self._sessions_of[row.tenant, row.idempotency_key] = row

    def forget(self, table: str, key: Key) -> rows.Row | None:
        """Takes a row out, and returns it."""
        row: rows.Row | None = self.tables[table].pop(key, None)
        if isinstance(row, rows.Checkpoint):
            address = (row.model_id, row.kind, row.name)
            if self._addresses.get(address) is row:
                del self._addresses[address]
        elif isinstance(row, rows.Sampler) and row.adapter_id is not None:
            self._samplers_of[row.adapter_id].remove(row)
        return row

    def apply(self, changes: Iterable[Change]) -> None:
        for change in changes:
            if isinstance(change, Update):
                row = self.tables[change.table].get(change.key)
                if row is None or (change.open and row.ended):
                    raise LookupError(f"{change.table} has no {'open ' * change.open}row {change.key}")
                for column, value in change.values.items():
                    setattr(row, column, value)
            elif isinstance(change, Add) and (row := self.tables[change.table].get(change.key)) is not None:
                _add(row, change.row)
            elif isinstance(change, Insert) and change.key in self.tables[change.table]:
                raise LookupError(f"{change.table} has the row {change.key} already")
            else:
                self.put(change.table, change.row)

    def compare(self, other: Ledger) -> Iterator[Difference]:
        """Each row in which the two are not the same: `old` is this one's. By table and key."""
        for name in rows.TABLES:
            mine, theirs = self.tables[name], other.tables[name]
            unlike = [key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)]
            for key in sorted(unlike, key=repr):
                yield Difference(name, key, mine.get(key), theirs.get(key))

    def differences(self, other: Ledger) -> Iterator[str]:
        """The same, a line for each row."""
        for found in self.compare(other):
            yield f"{found.table}{list(found.key)}: {found.old} is not {found.new}"

    def follow(self, records: Iterable[Record]) -> list[Difference]:
        """Applies the records, and tells what they changed in all: what `compare` would say of a copy from
        before, but only the rows that they touch are looked at and copied. `new` is the ledger's own row.
        LookupError as of `apply`."""
        before: dict[tuple[str, Key], rows.Row | None] = {}
        for record in records:
            changes = project(record)
            for change in changes:
                place = change.table, change.key
                if place not in before:
                    before[place] = copy(self.tables[change.table].get(change.key))
            self.apply(changes)
        after = (
            Difference(table, key, old, self.tables[table][key]) for (table, key), old in before.items()
        )
        unlike = [found for found in after if found.old != found.new]
        return sorted(unlike, key=lambda found: (_ORDER[found.table], repr(found.key)))


def fold(records: Iterable[Record]) -> Ledger:
    """The state that a journal describes."""
    ledger = Ledger()
    for record in records:
        ledger.apply(project(record))
    return ledger


# (table, key) -> column -> value.
Written = dict[tuple[str, Key], dict[str, Any]]


def last_written(records: Iterable[Record]) -> Written:
    """What the last events of a journal must have left in its tables, whatever came before them: every
    column that they wrote, and did not only add to. LookupError if one of them makes a row that another
    has made."""
    written: Written = {}
    for record in records:
        for change in project(record):
            if isinstance(change, Update):
                written.setdefault((change.table, change.key), {}).update(change.values)
                continue
            if isinstance(change, Add):
                continue
            place = change.table, change.key
            if isinstance(change, Insert) and place in written:
                raise LookupError(f"event {record.seq} makes {change.table}{list(place[1])} anew")
            written[place] = msgspec.structs.asdict(change.row)
    return written


def missing(written: Written, stored: Ledger) -> Iterator[str]:
    """One line for each row in which `stored` has not what was written."""
    for (table, key), values in written.items():
        row = stored.tables[table].get(key)
        if row is None:
            yield f"{table}{list(key)} is not there"
            continue
        wrong = {column: value for column, value in values.items() if getattr(row, column) != value}
        if wrong:
            found = {column: getattr(row, column) for column in wrong}
            yield f"{table}{list(key)}: {wrong} is not {found}"


def _add(row: rows.Row, more: rows.Row) -> None:
    for column in row.__struct_fields__:
        value = getattr(more, column)
        if column in row.SUMS:
            setattr(row, column, getattr(row, column) + value)
        elif value is not None:
            setattr(row, column, value)
