"""A user's own SQL over SQLite, which is asked about each thing that a statement would do (sql.py)."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import Connection

from tink.errors import UserError
from tink.journal import schema
from tink.journal.sql import Answer, read
from tink.limits import SQL_STEPS, SQL_VALUE_BYTES

# Of SQLite's authorizer. Not among them: writes, DDL, ATTACH, PRAGMA (as a function too) and transactions.
_ALLOWED = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE})
# Of the tables, what users have sent and got, and what would read any page of the file.
_FORBIDDEN_TABLES = frozenset({schema.short_bodies.name, "sqlite_dbpage"})
_FORBIDDEN_FUNCTIONS = frozenset({"load_extension", "fts3_tokenizer"})

# In the words of SQLite and its driver. VACUUM asks no authorizer: it refuses to run in a transaction.
_REFUSALS = ("not authorized", "prohibited", "one statement", "VACUUM")
ONLY_READING = (
    "only reading is allowed here, one statement at a time: SELECT, VALUES, WITH or EXPLAIN, and not of "
    f"{schema.short_bodies.name}"
)


def ask(
    connection: Connection, query: str, *, rows: int, seconds: float, clock: Callable[[], float]
) -> Answer:
    database = connection.connection.dbapi_connection
    assert isinstance(database, sqlite3.Connection)
    deadline = clock() + seconds
    with _bounds(database, lambda: clock() >= deadline):
        try:
            cursor = database.execute(query)
            if cursor.description is None:
                raise UserError("there is no statement in it: give a SELECT")
            columns = [str(column[0]) for column in cursor.description]
            return Answer(columns, *read(cursor, rows))
        # ValueError: text that is no UTF-8, or has a NUL.
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            interrupted = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT
            if interrupted and clock() < deadline:
                raise KeyboardInterrupt from None
            raise UserError(_told(error, interrupted, seconds)) from None


@contextmanager
def _bounds(database: sqlite3.Connection, late: Callable[[], bool]) -> Iterator[None]:
    before = database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, SQL_VALUE_BYTES)
    database.set_authorizer(_authorize)
    database.set_progress_handler(late, SQL_STEPS)
    try:
        yield
    finally:
        # Whoever opened the connection also ends its transaction.
        database.set_progress_handler(None, 0)
        database.set_authorizer(None)
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, before)


def _authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    if action == sqlite3.SQLITE_FUNCTION:
        allowed = str(second).lower() not in _FORBIDDEN_FUNCTIONS
    elif action == sqlite3.SQLITE_READ:
        # As the question writes it, where it takes no column.
        allowed = str(first).lower() not in _FORBIDDEN_TABLES
    elif action == sqlite3.SQLITE_UPDATE:
        # So SQLite makes a table-valued function (json_each) known to itself. A file that is opened to be
        # read has no schema that could be written.
        allowed = first == "sqlite_master"
    else:
        allowed = action in _ALLOWED
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def _told(error: Exception, interrupted: bool, seconds: float) -> str:
    if interrupted:
        return f"it was not answered within {seconds:g} s: ask for less, or give it longer"
    if schema.short_bodies.name in str(error):
        return f"requests and results are not for questions ({error})"
    if any(words in str(error) for words in _REFUSALS):
        return f"{ONLY_READING} ({error})"
    return f"SQLite says: {error}"
