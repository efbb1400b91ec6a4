"""Events and projections in SQL: the blocking half of the journal. It is called from threads."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple, TypeVar, get_args

import msgspec
from sqlalchemy import (
    ColumnElement,
    Connection,
    Executable,
    Select,
    Text,
    TextClause,
    and_,
    bindparam,
    cast,
    func,
    insert,
    or_,
    select,
    update,
)

from tink.domain import rows
from tink.domain.events import AnyEvent, JobAccepted, Record, Subject, TrainerStarted
from tink.domain.ledger import Ledger, fold
from tink.domain.projection import Add, Change, Insert, Key, Update, project
from tink.domain.written import Written, last_written, missing
from tink.errors import UNREADABLE, StartupError
from tink.journal import chain, schema
from tink.journal.database import batched, upsert
from tink.limits import CHECKED_EVENTS, FIRST_PROBLEM_CHARACTERS, READ_ROWS

R = TypeVar("R", bound=rows.Row)

# To make a statement costs as much as to run it.
_INSERT = insert(schema.events)
_ORDER = {table.name: place for place, table in enumerate(schema.metadata.sorted_tables)}


def write(connection: Connection, records: list[Record], before: bytes) -> bytes:
    """Inserts the records and their projections, in the connection's transaction. `before`: the hash of the
    last event; returns that of the last one now."""
    stored = []
    for record in records:
        _check_readable(record.event)
        row = event_row(record)
        before = chain.link(before, row)
        stored.append({**row, "hash": before})
    connection.execute(_INSERT, stored)
    _project(connection, records)
    return before


def _project(connection: Connection, records: Iterable[Record]) -> None:
    changes = [change for record in records for change in project(record)]
    # Runs of changes of one shape become one executemany. Their order is kept in each table; among the
    # tables it is that of the foreign keys.
    changes.sort(key=lambda change: _ORDER[change.table])
    for _, group in groupby(changes, key=_shape):
        _execute(connection, list(group))


def raw_events(connection: Connection, *, model: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of all events in order, with their hashes; or only those that make what there is of a model,
    and those of the workers and training servers."""
    table = schema.events
    query = select(table).order_by(table.c.seq)
    if model is not None:
        query = query.where(or_(_of_model(model), table.c.kind.in_(_PROCESS_KINDS)))
    with connection.execute(query, execution_options={"stream_results": True}) as found:
        for row in found.mappings():
            yield dict(row)


def put(connection: Connection, events: Sequence[dict[str, Any]]) -> None:
    """Inserts rows of `raw_events` as they are, with their projections, in the connection's transaction.
    LookupError for one that is damaged."""
    connection.execute(_INSERT, events)
    _project(connection, map(decoded, events))


def decoded(row: Mapping[str, Any]) -> Record:
    """What a row of `raw_events` says. LookupError if it is damaged."""
    return _record([*_head(row), *(row[name] for name in _SUBJECT)])


def _head(row: Mapping[str, Any]) -> Iterator[Any]:
    yield from (row[name] for name in ("seq", "at", "incarnation", "kind"))
    yield msgspec.json.encode(row["data"])


def _check_readable(event: AnyEvent) -> None:
    """What could not be read back at the next boot must not become durable now."""
    if _ANY.decode(msgspec.json.encode(event)) != event:
        raise ValueError(f"a {type(event).__name__} event does not survive being stored")


def event_row(record: Record) -> dict[str, Any]:
    data = msgspec.to_builtins(record.event)
    kind = data.pop("kind")
    return {
        "seq": record.seq,
        "at": record.at,
        "incarnation": record.incarnation,
        "kind": kind,
        "data": data,
        **msgspec.structs.asdict(record.subject),
    }


# The data as text: decoded once, into its event.
_SUBJECT = Subject.__struct_fields__
_COLUMNS = [
    *(schema.events.c[name] for name in ("seq", "at", "incarnation", "kind")),
    cast(schema.events.c.data, Text),
    *(schema.events.c[name] for name in _SUBJECT),
]
_PROCESS_KINDS = ("incarnation_started", "incarnation_stopped", "trainer_started")
_SESSION_KINDS = ("session_created", "session_finished", "session_moved")
# Made once: for a union that takes a hundred times as long as to decode.
_ANY = msgspec.json.Decoder(AnyEvent)
_DECODERS = {str(kind.__struct_config__.tag): msgspec.json.Decoder(kind) for kind in get_args(AnyEvent)}


def read_events(
    connection: Connection, after: int = 0, until: int | None = None, *, model: str | None = None
) -> Iterator[Record]:
    """Every event behind `after`, in order, up to and with `until`; or only those that make what there is
    of a model. LookupError for one that is damaged."""
    table = schema.events
    query = select(*_COLUMNS).where(table.c.seq > after).order_by(table.c.seq)
    if until is not None:
        query = query.where(table.c.seq <= until)
    if model is not None:
        query = query.where(_of_model(model))
    with connection.execute(query, execution_options={"stream_results": True}) as found:
        for part in found.partitions(READ_ROWS):
            for row in part:
                yield _record(row)


def _of_model(model: str) -> ColumnElement[bool]:
    """Of the events: the model's own, and its session's; and of each sampler of its adapter's versions, in
    whatever session. Every part of it has an index."""
    table, tables = schema.events, schema.metadata.tables
    models, adapters, samplers, jobs = (tables[name] for name in ("models", "adapters", "samplers", "jobs"))
    session = select(models.c.session_id).where(models.c.model_id == model).scalar_subquery()
    versions = select(adapters.c.adapter_id).where(adapters.c.model_id == model)
    its_samplers = select(samplers.c.sampler_id).where(samplers.c.adapter_id.in_(versions))
    samples = select(jobs.c.job_id).where(jobs.c.sampler_id.in_(its_samplers))
    return or_(
        table.c.model_id == model,
        and_(table.c.kind.in_(_SESSION_KINDS), table.c.session_id == session),
        and_(table.c.kind == "sampler_created", table.c.adapter_id.in_(versions)),
        table.c.job_id.in_(samples),
    )


class Span(NamedTuple):
    """What a journal holds: events 1 to `last`, the times of the first and of the last."""

    last: int
    began: float
    ended: float


def span(connection: Connection) -> Span | None:
    """None of a journal without events."""
    table = schema.events
    last = last_seq(connection)
    ends = select(table.c.at).where(table.c.seq.in_((1, last))).order_by(table.c.seq)
    times = connection.execute(ends).scalars().all()
    return Span(last, float(times[0]), float(times[-1])) if times else None


def seq_at(connection: Connection, at: float) -> int:
    """The last event that is not later than that (a clock may have been set back); 0 if each is."""
    table = schema.events
    query = select(table.c.seq).where(table.c.at <= at).order_by(table.c.seq.desc()).limit(1)
    return int(connection.execute(query).scalar() or 0)


def event_of(connection: Connection, seq: int) -> Record:
    """LookupError if it is damaged."""
    return _record(connection.execute(select(*_COLUMNS).where(schema.events.c.seq == seq)).one())


def acceptance(connection: Connection, job: rows.Job) -> JobAccepted:
    """The event that accepted a job. LookupError if it is not what is there."""
    event = event_of(connection, job.accepted_seq).event
    if not isinstance(event, JobAccepted):
        raise LookupError(f"event {job.accepted_seq} does not accept {job.job_id}")
    return event


def last_trainer(connection: Connection) -> TrainerStarted | None:
    """The training server that answered last."""
    table = schema.events
    query = select(*_COLUMNS).where(table.c.kind == "trainer_started").order_by(table.c.seq.desc()).limit(1)
    row = connection.execute(query).one_or_none()
    event = None if row is None else _record(row).event
    return event if isinstance(event, TrainerStarted) else None


def count(connection: Connection, kind: type[AnyEvent]) -> int:
    """The events of one kind."""
    table = schema.events
    tag = kind.__struct_config__.tag
    query = select(func.count()).select_from(table).where(table.c.kind == tag)
    return int(connection.execute(query).scalar_one())


def last_seq(connection: Connection, upto: int | None = None) -> int:
    """Of all events, or of those up to and with a number; 0 if there is none."""
    query = select(func.coalesce(func.max(schema.events.c.seq), 0))
    if upto is not None:
        query = query.where(schema.events.c.seq <= upto)
    return int(connection.execute(query).scalar_one())


def first_boot(connection: Connection) -> str | None:
    """The id of the worker that made the journal; None if it is empty."""
    table = schema.incarnations
    found = connection.execute(select(table.c.boot_id).where(table.c.number == 1)).scalar_one_or_none()
    return None if found is None else str(found)


def last_incarnation(connection: Connection) -> int:
    """Of the worker that wrote the last event; 0 in an empty journal."""
    table = schema.events
    query = select(table.c.incarnation).order_by(table.c.seq.desc()).limit(1)
    return int(connection.execute(query).scalar() or 0)


def read_tables(connection: Connection) -> Ledger:
    """The projections as they are stored, all of them."""
    ledger = Ledger()
    for name, (kind, _key) in rows.TABLES.items():
        for row in read_rows(connection, select(schema.metadata.tables[name]), kind):
            ledger.put(name, row)
    return ledger


# What a worker has in memory, and of which rows: those that have not ended, and go on. The other tables are
# looked up by key, or not at all.
PRESENT: dict[str, TextClause | ColumnElement[bool]] = {
    "sessions": or_(
        schema.sessions.c.state == "open",
        schema.sessions.c.session_id.in_(select(schema.samplers.c.session_id).where(schema.SAMPLED)),
        schema.sessions.c.session_id.in_(select(schema.models.c.session_id).where(schema.TRAINED)),
    ),
    "models": schema.TRAINED,
    "samplers": schema.SAMPLED,
    "jobs": schema.OPEN_JOBS,
    "adapters": schema.LIVE,
    "checkpoints": schema.LIVE,
    "snapshots": schema.LIVE,
}


def read_present(connection: Connection) -> Ledger:
    """What a worker goes on with. It does not grow with the jobs that were ever run."""
    ledger = Ledger()
    for name, condition in PRESENT.items():
        query = select(schema.metadata.tables[name]).where(condition)
        for row in read_rows(connection, query, rows.TABLES[name][0]):
            ledger.put(name, row)
    return ledger


def read_rows(connection: Connection, query: Select[Any], kind: type[R]) -> Iterator[R]:
    """The rows of a query that selects a whole table's columns."""
    found = connection.execute(query)
    names = tuple(found.keys())
    for row in found:
        yield kind(**dict(zip(names, row, strict=True)))


def _record(row: Sequence[Any]) -> Record:
    seq, at, incarnation, kind, data, tenant, session_id, model_id, job_id, adapter_id, replica = row
    try:
        event: AnyEvent = _DECODERS[kind].decode(data)
    except (KeyError, *UNREADABLE) as error:
        raise LookupError(f"event {seq} is not one that this Tink can read: {error}") from None
    subject = Subject(
        tenant=tenant,
        session_id=session_id,
        model_id=model_id,
        job_id=job_id,
        adapter_id=adapter_id,
        replica=replica,
    )
    return Record(seq, at, incarnation, subject, event)


def _shape(change: Change) -> tuple[type[Change], str, tuple[str, ...], bool]:
    if isinstance(change, Update):
        return Update, change.table, tuple(change.values), change.open
    return type(change), change.table, (), False


def _execute(connection: Connection, changes: list[Change]) -> None:
    first = changes[0]
    keys = rows.TABLES[first.table][1]
    parameters = [
        {f"key_{name}": part for name, part in zip(keys, change.key, strict=True)}
        | {f"new_{column}": value for column, value in change.values.items()}
        if isinstance(change, Update)
        else msgspec.structs.asdict(change.row)
        for change in changes
    ]
    done = connection.execute(_statement(connection.dialect.name, *_shape(first)), parameters)
    if isinstance(first, Update) and done.rowcount != len(parameters):
        raise LookupError(f"{first.table} lacks a row of {[change.key for change in changes[:3]]}")


@functools.cache  # few shapes, and to make a statement costs more than to run it
def _statement(
    dialect: str, kind: type[Change], name: str, columns: tuple[str, ...], is_open: bool
) -> Executable:
    table = schema.metadata.tables[name]
    keys = rows.TABLES[name][1]
    if kind is Update:
        chosen = update(table).where(*(table.c[key] == bindparam(f"key_{key}") for key in keys))
        if is_open:
            chosen = chosen.where(schema.OPEN_JOBS)
        return chosen.values({column: bindparam(f"new_{column}") for column in columns})
    if kind is Insert:
        return insert(table)
    putting = upsert(dialect, table)
    new = putting.excluded
    others = [column for column in table.columns if column.name not in keys]
    values: dict[str, ColumnElement[Any]] = {column.name: new[column.name] for column in others}
    if kind is Add:
        sums = rows.TABLES[name][0].SUMS
        for old in others:
            added, replaced = old + new[old.name], func.coalesce(new[old.name], old)
            values[old.name] = added if old.name in sums else replaced
    upserted: Executable = putting.on_conflict_do_update(index_elements=list(keys), set_=values)
    return upserted


def check(connection: Connection, *, whole: bool = True) -> list[str]:
    """Where the tables are not the fold of the events; empty when all is well. Takes the longer the more
    has happened. `whole`: false for a part of a journal, where events may be missing."""
    try:
        stored = read_tables(connection)
        events = read_events(connection)
        return list(fold(gapless(events) if whole else events).differences(stored))
    except (LookupError, *UNREADABLE) as error:
        return [str(error)]


def damaged(place: str, wrong: list[str]) -> StartupError:
    return StartupError(
        f"{place} is damaged: its tables are not what its events say ({len(wrong)} differences, the first: "
        f"{wrong[0][:FIRST_PROBLEM_CHARACTERS]}); restore a backup, or look at it with 'tink db check'"
    )


def check_end(connection: Connection, present: Ledger) -> list[str]:
    """The part of `check` that takes the same time however much has happened: of the last events none is
    missing, and what they wrote is in the tables. To count them all would take a second for a million,
    from a disk that is cold. `present`: what was read of the tables already."""
    after = max(0, last_seq(connection) - CHECKED_EVENTS)
    try:
        written = last_written(gapless(read_events(connection, after), after))
        return list(missing(written, _stored(connection, written, present)))
    except (LookupError, *UNREADABLE) as error:
        return [str(error)]


def _stored(connection: Connection, written: Written, present: Ledger) -> Ledger:
    """The rows that are named in `written`, as far as they are there."""
    stored = Ledger()
    wanted: defaultdict[str, list[Key]] = defaultdict(list)
    for name, key in written:
        row = present.tables[name].get(key)
        if row is not None:
            stored.put(name, row)
        else:
            wanted[name].append(key)
    for name, keys in wanted.items():
        kind, (column, *_) = rows.TABLES[name]
        table = schema.metadata.tables[name]
        # By the first column of the key: SQLite would scan the table for a pair.
        for some in batched([key[0] for key in keys]):
            query = select(table).where(table.c[column].in_(some))
            for row in read_rows(connection, query, kind):
                stored.put(name, row)
    return stored


def gapless(records: Iterable[Record], after: int = 0) -> Iterator[Record]:
    """The same records, which begin behind `after`; LookupError at the first that is missing."""
    for expected, record in enumerate(records, after + 1):
        if record.seq != expected:
            raise LookupError(f"the journal has no event {expected}: the next one is {record.seq}")
        yield record
