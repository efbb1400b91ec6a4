"""Events and projections in SQL: the blocking half of the journal. It is called from threads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import msgspec
from sqlalchemy import Connection, bindparam, func, insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from tink.domain import rows
from tink.domain.events import AnyEvent, Record, Subject, TrainerStarted
from tink.domain.projection import Change, Insert, Ledger, Update, fold, project
from tink.journal import schema


def write(connection: Connection, records: list[Record]) -> None:
    """Inserts the records and their projections, in the connection's transaction."""
    for record in records:
        _check_readable(record.event)
    connection.execute(insert(schema.events), [event_row(record) for record in records])
    changes = [change for record in records for change in project(record)]
    # Runs of changes of one shape become one executemany; their order is kept.
    for _, group in groupby(changes, key=_shape):
        _execute(connection, list(group))


def _check_readable(event: AnyEvent) -> None:
    """What could not be read back at the next boot must not become durable now."""
    if msgspec.json.decode(msgspec.json.encode(event), type=AnyEvent) != event:
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


def read_events(connection: Connection, after: int = 0) -> Iterator[Record]:
    """Every event behind `after`, in order. LookupError for one that is damaged."""
    table = schema.events
    query = select(table).where(table.c.seq > after).order_by(table.c.seq)
    for row in connection.execution_options(stream_results=True).execute(query).mappings():
        yield _record(row)


def event_of(connection: Connection, seq: int) -> Record:
    table = schema.events
    return _record(connection.execute(select(table).where(table.c.seq == seq)).mappings().one())


def last_trainer(connection: Connection) -> TrainerStarted | None:
    """The training server that answered last."""
    table = schema.events
    query = select(table).where(table.c.kind == "trainer_started").order_by(table.c.seq.desc()).limit(1)
    row = connection.execute(query).mappings().one_or_none()
    event = None if row is None else _record(row).event
    return event if isinstance(event, TrainerStarted) else None


def last_seq(connection: Connection) -> int:
    return int(connection.execute(select(func.coalesce(func.max(schema.events.c.seq), 0))).scalar_one())


def read_tables(connection: Connection, *, closed_jobs: bool) -> Ledger:
    """The projections as they are stored; of the jobs only the open ones unless `closed_jobs`."""
    ledger = Ledger()
    for name, (kind, _key) in rows.TABLES.items():
        table = schema.metadata.tables[name]
        query = select(table)
        if name == "jobs" and not closed_jobs:
            query = query.where(schema.OPEN_JOBS)
        for row in connection.execute(query).mappings():
            ledger.put(name, kind(**row))
    return ledger


def _record(row: Any) -> Record:
    columns = dict(row)
    data = {**columns.pop("data"), "kind": columns.pop("kind")}
    head = {name: columns.pop(name) for name in ("seq", "at", "incarnation")}
    try:
        event: AnyEvent = msgspec.convert(data, AnyEvent)
    except msgspec.ValidationError as error:
        raise LookupError(f"event {head['seq']} is not one that this Tink can read: {error}") from None
    return Record(subject=Subject(**columns), event=event, **head)


def _shape(change: Change) -> tuple[object, ...]:
    columns = tuple(change.values) if isinstance(change, Update) else ()
    return type(change), change.table, columns


def _execute(connection: Connection, changes: list[Change]) -> None:
    first = changes[0]
    table = schema.metadata.tables[first.table]
    keys = rows.TABLES[first.table][1]
    if isinstance(first, Update):
        statement: Any = update(table).where(*(table.c[name] == bindparam(f"key_{name}") for name in keys))
        statement = statement.values({column: bindparam(f"new_{column}") for column in first.values})
        parameters = [
            {f"key_{name}": part for name, part in zip(keys, change.key, strict=True)}
            | {f"new_{column}": value for column, value in change.values.items()}
            for change in changes
            if isinstance(change, Update)
        ]
    else:
        statement = insert(table)
        if not isinstance(first, Insert):
            replacing = upsert(table)
            statement = replacing.on_conflict_do_update(
                index_elements=list(keys),
                set_={c.name: replacing.excluded[c.name] for c in table.columns if c.name not in keys},
            )
        parameters = [
            msgspec.structs.asdict(change.row) for change in changes if not isinstance(change, Update)
        ]
    done = connection.execute(statement, parameters)
    if isinstance(first, Update) and done.rowcount != len(parameters):
        raise LookupError(f"{first.table} lacks a row of {[change.key for change in changes[:3]]}")  # type: ignore[union-attr]


def check(connection: Connection, stored: Ledger | None = None) -> list[str]:
    """Where the tables are not the fold of the events; empty when all is well."""
    stored = stored if stored is not None else read_tables(connection, closed_jobs=True)
    return list(fold(gapless(read_events(connection))).differences(stored))


def gapless(records: Iterable[Record]) -> Iterator[Record]:
    """The same records; LookupError at the first that is missing."""
    for expected, record in enumerate(records, 1):
        if record.seq != expected:
            raise LookupError(f"the journal has no event {expected}: the next one is {record.seq}")
        yield record
