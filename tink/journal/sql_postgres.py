"""A user's own SQL over PostgreSQL, where a SELECT may do whatever its role may: end the worker's
connection, take its lock, read a file. So the server first has to say what the question consists of, as a
view that is made and taken back; it is run if all of that is known to do no more than compute
(docs/decisions/0024-postgresql.md)."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing
from typing import Any, Literal

import psycopg
from psycopg.adapt import Buffer, Loader
from psycopg.types.string import TextLoader
from sqlalchemy import Connection

from tink.errors import UserError
from tink.journal import revisions, schema
from tink.journal.database import one_line
from tink.journal.sql import Answer, read
from tink.journal.views import VIEWS
from tink.limits import SQL_SPILL_BYTES

ONLY_READING = "only reading is allowed here, one statement at a time: SELECT, VALUES or WITH"

# What may be asked; of the rest of the server, nothing. Not the bodies, though they are in this database.
_RELATIONS = [
    "pg_temp.tink_question",  # older servers note it in itself
    *(name for name in schema.metadata.tables if name != schema.short_bodies.name),
    revisions.version_table("journal"),
    *VIEWS,
    *(f"information_schema.{name}" for name in ("tables", "views", "columns")),
]
# PostgreSQL's own functions that are VOLATILE may do anything; these only give another answer each time.
_FICKLE = [
    *("random", "random_normal", "array_sample", "array_shuffle", "clock_timestamp", "timeofday"),
    *("gen_random_uuid", "uuidv4", "uuidv7"),
]
# The others change nothing; but these look elsewhere: at the server, at its settings, at any table.
_ELSEWHERE = "^(pg_(?!typeof$)|txid_|fmgr_|current_setting$|(table|schema|database)_to_xml)"
# In a parse tree as text: `:name number`, and lists of numbers. What the user wrote has a backslash before
# each space there.
_FIELD = re.compile(r":(\w+) (\d+)")
_LIST = re.compile(r"\(o((?: \d+)+)\)")
_FUNCTIONS = frozenset({"funcid", "opfuncid", "aggfnoid", "winfnoid"})
# Numbers of nothing.
_PLAIN = re.compile("typmod$|^(frameOptions|requiredPerms|checkAsUser|constvalue|location|stmt_\\w+)$")

# What has a smaller number than 16384 was made with the server.
_REFUSED = """
WITH known AS (
  SELECT c.oid, c.reltype, t.typarray FROM unnest(%(known)s::text[]) name
  JOIN pg_class c ON c.oid = to_regclass(name) JOIN pg_type t ON t.oid = c.reltype
)
SELECT pg_describe_object('pg_proc'::regclass, oid, 0) FROM pg_proc
WHERE oid = ANY (%(functions)s::oid[]) AND NOT (oid < 16384 AND CASE provolatile
  WHEN 'i' THEN true WHEN 's' THEN proname !~ %(elsewhere)s ELSE proname = ANY (%(fickle)s) END)
UNION ALL
SELECT pg_describe_object('pg_class'::regclass, oid, 0) FROM pg_class
WHERE oid = ANY (%(relations)s::oid[]) AND oid NOT IN (SELECT oid FROM known)
UNION ALL
SELECT coalesce('type ' || t.typname, 'object ' || other) FROM unnest(%(others)s::oid[]) other
LEFT JOIN pg_type t ON t.oid = other
WHERE other >= 16384 AND other NOT IN (SELECT unnest(ARRAY[oid, reltype, typarray]) FROM known)
LIMIT 1
"""
# The views as well: what they stand on is run, too.
_TREES = """
SELECT string_agg(ev_action::text, E'\\n') FROM pg_rewrite
WHERE ev_class = 'pg_temp.tink_question'::regclass
   OR ev_class IN (SELECT to_regclass(name) FROM unnest(%(views)s::text[]) name)
"""
_BOUNDS = """
SELECT set_config('statement_timeout', %(milliseconds)s, true),
       CASE current_setting('is_superuser')
       WHEN 'on' THEN set_config('temp_file_limit', %(spill)s, true) END
"""


class _Number(Loader):
    """NUMERIC, which sums and averages are, as SQLite has it."""

    def load(self, data: Buffer) -> int | float:
        text = bytes(data).decode()
        return float(text) if re.search("[^0-9-]", text) else int(text)


class _Truth(Loader):
    def load(self, data: Buffer) -> int:
        return int(bytes(data) == b"t")


# What there is for each on SQLite, too. All else is text, as PostgreSQL writes it.
_KEPT = frozenset({"int2", "int4", "int8", "oid", "float4", "float8", "bytea"})


def ask(
    connection: Connection, query: str, *, rows: int, seconds: float, clock: Callable[[], float]
) -> Answer:
    database = connection.connection.dbapi_connection
    assert isinstance(database, psycopg.Connection)
    if not re.sub(r"--[^\n]*|/\*.*?\*/", "", query, flags=re.DOTALL).strip(" \t\r\n;"):
        raise UserError("there is no statement in it: give a SELECT")
    if "\0" in query:
        raise UserError("it has a NUL in it, which PostgreSQL takes for its end")
    # Whatever stands in it, this is checked and the same is run.
    source = f"FROM (\n{query.rstrip().removesuffix(';')}\n) AS answer"
    deadline = clock() + seconds
    connection.rollback()
    try:
        _begin(database, "WRITE", deadline - clock())
        _check(database, source)
        database.rollback()
        _begin(database, "ONLY", deadline - clock())
        described = _one_statement(database, f"SELECT * {source} LIMIT 0").description
        columns = [column.name for column in described or ()]
        with closing(_cursor(database).stream(f"SELECT * {source}")) as answered:
            return Answer(columns, *read(answered, rows))
    # ValueError: text that is no Unicode, or a number that is too long.
    except (psycopg.Error, ValueError) as error:
        raise UserError(_told(error, seconds)) from None


def _begin(database: psycopg.Connection[Any], mode: Literal["WRITE", "ONLY"], seconds: float) -> None:
    """A transaction, of which each statement may take so long."""
    try:
        database.execute(f"SET TRANSACTION READ {mode}")
    except psycopg.errors.FeatureNotSupported:
        raise UserError(
            "this is a replica, which cannot check a question: ask the server that it follows"
        ) from None
    milliseconds = min(max(int(seconds * 1000), 1), 2**31 - 1)
    database.execute(_BOUNDS, {"milliseconds": f"{milliseconds}", "spill": f"{SQL_SPILL_BYTES // 1024}kB"})


def _check(database: psycopg.Connection[Any], source: str) -> None:
    """UserError if what stands there would do more than read the journal. Whoever calls takes back what it
    has done: nothing was run."""
    _one_statement(database, f"CREATE TEMP VIEW tink_question AS SELECT 1 {source}")
    ((trees,),) = database.execute(_TREES, {"views": list(VIEWS)}).fetchall()
    fields = {(name, int(number)) for name, number in _FIELD.findall(trees) if not _PLAIN.search(name)}
    lists = {int(number) for numbers in _LIST.findall(trees) for number in numbers.split()}
    given = {
        "functions": [number for name, number in fields if name in _FUNCTIONS],
        "relations": [number for name, number in fields if name == "relid"],
        "others": [*(lists | {number for _, number in fields})],
        "known": _RELATIONS,
        "fickle": _FICKLE,
        "elsewhere": _ELSEWHERE,
    }
    for (refused,) in database.execute(_REFUSED, given):
        raise UserError(f"only reading is allowed here, and of the journal alone: not {refused}")


def _one_statement(database: psycopg.Connection[Any], statement: str) -> psycopg.Cursor[Any]:
    """Binary answers are asked for by the extended protocol alone, which takes no second statement."""
    return database.execute(statement, binary=True)


def _cursor(database: psycopg.Connection[Any]) -> psycopg.Cursor[Any]:
    cursor = database.cursor()
    for kind in cursor.adapters.types:
        if kind.name not in _KEPT:
            cursor.adapters.register_loader(kind.oid, TextLoader)
        cursor.adapters.register_loader(kind.array_oid, TextLoader)
    cursor.adapters.register_loader("numeric", _Number)
    cursor.adapters.register_loader("bool", _Truth)
    return cursor


def _told(error: Exception, seconds: float) -> str:
    if isinstance(error, psycopg.errors.QueryCanceled):
        return f"it was not answered within {seconds:g} s: ask for less, or give it longer"
    told = f"PostgreSQL says: {one_line(error)}"
    if isinstance(error, psycopg.Error):
        told = f"PostgreSQL says: {one_line(error.diag.message_primary or error)}"
        refusals = (psycopg.errors.SyntaxError, psycopg.errors.FeatureNotSupported)
        if isinstance(error, (*refusals, psycopg.errors.ReadOnlySqlTransaction)):
            return f"{ONLY_READING} ({told})"
    return told
