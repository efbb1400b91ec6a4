"""What `tink db check` looks at. Every check only reads, and says in words what is wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Literal

import msgspec
from sqlalchemy import Connection, select

from tink.errors import StartupError
from tink.home import Home
from tink.journal import chain, migrations, queries, revisions, schema, store
from tink.journal.bodies import Shelf
from tink.journal.database import Database, database
from tink.journal.reader import open_snapshot
from tink.journal.revisions import Schema
from tink.limits import CHECKED_BODIES, PROBLEM_CHARACTERS, SHOWN_PROBLEMS


class Check(msgspec.Struct, kw_only=True):
    """`detail`: what was looked at. `problems`: what is wrong there, one line each."""

    database: Schema
    name: Literal["file", "schema", "events", "tables", "bodies"]
    ok: bool
    detail: str
    problems: list[str]


def check(home: Home, *, quick: bool) -> Iterator[Check]:
    """Every check, as it ends. What cannot be told because the file or its schema is wrong is left out.
    The longer bodies are read after the journal: such a body is stored before the event that names it."""
    due: dict[str, str] = {}
    journal, bodies = database(home, "journal"), database(home, "bodies")
    try:
        with open_snapshot(journal) as connection:
            basis = [_file(connection, journal, quick), _schema(connection, journal)]
            yield from basis
            if all(part.ok for part in basis):
                yield _events(connection)
                yield _tables(connection)
                due = queries.bodies_due(connection)
                yield _bodies(Shelf(connection, schema.short_bodies), "journal", due, quick)
    except StartupError as error:
        yield _found("journal", "file", journal.place, [str(error)])
    if not bodies.exists():
        yield _found("bodies", "file", bodies.place, ["there is no such database"])
        return
    try:
        with open_snapshot(bodies) as connection:
            basis = [_file(connection, bodies, quick), _schema(connection, bodies)]
            yield from basis
            if all(part.ok for part in basis):
                found = _bodies(Shelf(connection, schema.bodies), "bodies", due, quick)
                yield _complete(found, due, journal)
    except StartupError as error:
        yield _found("bodies", "file", bodies.place, [str(error)])


def _found(database: Schema, name: str, detail: str, problems: list[str]) -> Check:
    more = len(problems) - SHOWN_PROBLEMS
    shown = [problem[:PROBLEM_CHARACTERS] for problem in problems[:SHOWN_PROBLEMS]]
    if more > 0:
        shown.append(f"... and {more:,} more")
    return Check(database=database, name=name, ok=not problems, detail=detail, problems=shown)  # type: ignore[arg-type]


def _file(connection: Connection, database: Database, quick: bool) -> Check:
    return _found(database.schema, "file", *database.check_file(connection, quick=quick))


def _schema(connection: Connection, database: Database) -> Check:
    found = revisions.look(connection, database.schema)
    detail = f"revision {found.revision or 'none'}, head {revisions.HEADS[found.schema]}"
    problem = found.problem(database.place)
    wrong = [str(problem)] if problem else migrations.differences(connection, found.schema)
    return _found(found.schema, "schema", detail, wrong)


def _events(connection: Connection) -> Check:
    """Numbered 1, 2, 3, ... without a gap, and each as it was written."""
    problems = list(chain.breaks(connection))
    return _found("journal", "events", f"{chain.head(connection).seq:,} events, and their hashes", problems)


def _tables(connection: Connection) -> Check:
    """The tables are what the events say: all of it; a start looks at the end only."""
    return _found("journal", "tables", "fold(events) == tables", store.check(connection))


def _bodies(shelf: Shelf, database: Schema, due: dict[str, str], quick: bool) -> Check:
    """Each has the hash that is its name. Those that are there are taken out of `due`: hash -> job."""
    connection, table = shelf
    problems: list[str] = []
    total = 0
    columns = [table.c.sha256, table.c.size] if quick else [table.c.sha256, table.c.size, table.c.content]
    bodies = connection.execute(select(*columns), execution_options={"yield_per": CHECKED_BODIES})
    for count, (digest, size, *content) in enumerate(bodies, 1):
        total = count
        due.pop(digest, None)
        if content and (hashlib.sha256(content[0]).hexdigest() != digest or len(content[0]) != size):
            problems.append(f"the body {digest} is damaged: it is not what was stored")
    how = "not hashed again (--quick)" if quick else "each hashed again"
    return _found(database, "bodies", f"{total:,} bodies, {how}", problems)


def _complete(found: Check, due: dict[str, str], journal: Database) -> Check:
    """And what is left in `due` is missing, unless it has been pruned since."""
    if not due:
        return found
    with open_snapshot(journal) as connection:
        still = queries.bodies_due(connection)
    missing = [f"the body {d} of the job {still[d]} is missing" for d in due if d in still]
    return _found("bodies", "bodies", found.detail, [*found.problems, *missing])
