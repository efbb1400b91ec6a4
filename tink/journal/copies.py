"""A journal copied into another database, event for event and with its hashes, and held against the one
that it was copied from; or a part of it. The tables are made anew from the events: they are nothing else.
All of it blocks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import Connection, func, insert, select

from tink.domain.events import Record, Subject
from tink.domain.ledger import Ledger, fold
from tink.domain.projection import project
from tink.errors import UNREADABLE, JournalUnavailable, StartupError
from tink.home import Home
from tink.journal import chain, schema, store
from tink.journal.bodies import Shelf, Stored, oldest
from tink.journal.database import Database, database_errors, upsert
from tink.journal.sqlite import writer_engine
from tink.limits import COPY_EVENTS, FIRST_PROBLEM_CHARACTERS

# What is told as it goes on: so many more events, or bodies.
Advance = Callable[[int], None]


class Bodies(NamedTuple):
    """`number` of them, `size` in bytes. `mark`: the same for the same bodies with the same names and
    times, whatever their order."""

    number: int
    size: int
    mark: int


def size(shelf: Shelf) -> int:
    """How many bodies there are to copy."""
    return int(shelf.connection.execute(select(func.count()).select_from(shelf.table)).scalar_one())


# -- events -----------------------------------------------------------------------------------------


def copy_events(source: Connection, target: Connection, into: Database, advance: Advance) -> None:
    """StartupError for a damaged event, JournalUnavailable if `into` cannot be written. The tables get each
    row as it is in the end: to write it with each event again takes three times as long."""
    rows = Ledger()
    failed = f"{into.place} cannot be written"
    for batch in _batches(store.raw_events(source)):
        try:
            for event in batch:
                rows.apply(project(store.decoded(event)))
        except (LookupError, *UNREADABLE) as error:
            raise StartupError(f"what is to be copied is damaged: {error}") from error
        try:
            with database_errors(failed):
                target.execute(insert(schema.events), batch)
                into.settle(target)
        except JournalUnavailable as error:
            raise JournalUnavailable(f"{error}{_nul(batch) if into.contended else ''}") from error
        advance(len(batch))
    for table in schema.metadata.sorted_tables:
        for some in _batches(map(msgspec.structs.asdict, rows.tables.get(table.name, {}).values())):
            with database_errors(failed):
                target.execute(insert(table), some)
                into.settle(target)
            advance(0)


def verify_events(target: Connection, into: Database, expected: chain.Head, advance: Advance) -> None:
    """StartupError unless these are the events up to `expected`, each with the hash that it had, and the
    tables are what they say."""
    last = chain.NONE

    def records() -> Iterator[Record]:
        nonlocal last
        for row, last, problem in chain.walk(store.raw_events(target)):
            if problem is not None:
                raise LookupError(problem)
            yield store.decoded(row)
            if last.seq % COPY_EVENTS == 0:
                advance(COPY_EVENTS)

    try:
        wrong = list(fold(records()).differences(store.read_tables(target)))
    except (LookupError, *UNREADABLE) as error:
        wrong = [str(error)]
    else:
        if last != expected:
            wrong.insert(0, f"it ends with event {last.seq}, not {expected.seq}")
    if wrong:
        raise StartupError(
            f"the copy in {into.place} is not what was copied ({len(wrong)} differences, the first: "
            f"{wrong[0][:FIRST_PROBLEM_CHARACTERS]}): nothing was changed; 'tink db check' says if it was "
            "damaged before"
        )


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == COPY_EVENTS:
            yield batch
            batch = []
    if batch:
        yield batch


def _nul(batch: list[dict[str, Any]]) -> str:
    """Why PostgreSQL has refused it, if that is why: a worker that could still write to SQLite alone has
    journaled what clients sent as it was."""
    columns = [*Subject.__struct_fields__, "data"]
    encoded = ((row["seq"], msgspec.json.encode([row[name] for name in columns])) for row in batch)
    found = next((seq for seq, text in encoded if b"\\u0000" in text), None)
    return "" if found is None else f" (event {found} has a NUL in it, which PostgreSQL cannot keep)"


# -- bodies -----------------------------------------------------------------------------------------


def copy_bodies(source: Shelf, target: Connection, into: Database, advance: Advance) -> Bodies:
    """To the table of the same name. StartupError for a damaged body, JournalUnavailable if `into` cannot
    be written. One that is there already, from a copy that did not come to its end, is replaced."""
    statement = upsert(target.dialect.name, source.table)
    others = {name: statement.excluded[name] for name in ("size", "stored_at", "content")}
    statement = statement.on_conflict_do_update(index_elements=["sha256"], set_=others)
    found = Bodies(0, 0, 0)
    for page in _pages(source, "what is to be copied"):
        with database_errors(f"{into.place} cannot be written"):
            target.execute(statement, [{**one._asdict(), "content": content} for one, content in page])
            into.settle(target)
        found = _counted(found, page)
        advance(len(page))
    return found


def verify_bodies(target: Shelf, into: Database, expected: Bodies, advance: Advance) -> None:
    """StartupError unless these are the bodies, and each has the hash that is its name."""
    found = Bodies(0, 0, 0)
    for page in _pages(target, into.place):
        found = _counted(found, page)
        advance(len(page))
    if found != expected:
        raise StartupError(
            f"{into.place} has {found.number:,} bodies ({found.size:,} bytes), not the {expected.number:,} "
            f"({expected.size:,} bytes) that were copied: name a database that is empty"
        )


# Bodies with what is in them.
_Page = list[tuple[Stored, bytes]]


def _pages(shelf: Shelf, whose: str) -> Iterator[_Page]:
    """All bodies, the oldest first, as many at a time as memory has room for. StartupError for one that is
    not what its name says."""
    connection, table = shelf
    last: Stored | None = None
    while page := oldest([shelf], math.inf, last):
        last = page[-1]
        query = select(table.c.sha256, table.c.content)
        query = query.where(table.c.sha256.in_([one.sha256 for one in page]))
        contents = {row.sha256: row.content for row in connection.execute(query)}
        for digest, size, _ in page:
            content = contents[digest]
            if hashlib.sha256(content).hexdigest() != digest or len(content) != size:
                raise StartupError(f"{whose}: the body {digest} is damaged: it is not what was stored")
        yield [(one, contents[one.sha256]) for one in page]


def _counted(found: Bodies, page: _Page) -> Bodies:
    mark = found.mark
    for one, _ in page:
        mark ^= int.from_bytes(hashlib.sha256(repr(tuple(one)).encode()).digest(), "big")
    return Bodies(found.number + len(page), found.size + sum(one.size for one, _ in page), mark)


# -- a part -----------------------------------------------------------------------------------------


class Part:
    """Made by `write_part`."""

    def __init__(self, journal: Connection, bodies: Connection) -> None:
        self._journal, self._bodies = journal, bodies

    def events(self, rows: Iterable[dict[str, Any]]) -> None:
        """Rows of `raw_events`, in order. LookupError for one that is damaged."""
        for batch in _batches(rows):
            store.put(self._journal, batch)

    def bodies(self, contents: Iterable[tuple[str, bytes]]) -> None:
        """With their names."""
        for digest, content in contents:
            row = {"sha256": digest, "size": len(content), "stored_at": 0.0, "content": content}
            self._bodies.execute(insert(schema.bodies), [row])


@contextmanager
def write_part(home: Home) -> Iterator[Part]:
    """Some of a journal's events and bodies, in the files of a home that has none yet. They are there once
    this has been left."""
    with _written(home.journal) as journal, _written(home.bodies) as bodies:
        yield Part(journal, bodies)


@contextmanager
def _written(file: Path) -> Iterator[Connection]:
    engine = writer_engine(file)
    try:
        with engine.connect() as connection:
            # Rows may go back to others that are not in the part.
            connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
            connection.commit()
            with connection.begin():
                yield connection
    finally:
        engine.dispose()
