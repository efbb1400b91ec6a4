"""A user's own SQL over the journal: it can change nothing, reach nothing else, and ends in time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from sqlalchemy import Connection

from tink.limits import SQL_ANSWER_BYTES


class Answer(NamedTuple):
    """`rows`: as many as were asked for at most; `cut`: why there are no more of them, if there are."""

    columns: list[str]
    rows: list[tuple[Any, ...]]
    cut: str | None


def ask(
    connection: Connection, query: str, *, rows: int, seconds: float, clock: Callable[[], float]
) -> Answer:
    """What the database answers to `query`, at most so many rows of it, within so many seconds of `clock`.
    `connection`: of journal/reader.py, which may only read. Raises UserError for what is no query, is not
    allowed, or takes longer. Blocks; Ctrl-C ends it."""
    if connection.dialect.name == "postgresql":
        from tink.journal import sql_postgres  # an extra

        return sql_postgres.ask(connection, query, rows=rows, seconds=seconds, clock=clock)
    from tink.journal import sql_sqlite

    return sql_sqlite.ask(connection, query, rows=rows, seconds=seconds, clock=clock)


def read(answered: Iterable[tuple[Any, ...]], most: int) -> tuple[list[tuple[Any, ...]], str | None]:
    """The rows and `cut` of an Answer."""
    found: list[tuple[Any, ...]] = []
    size = 0
    for row in answered:
        if len(found) == most:
            return found, f"there are more than {most} rows: ask for less, or for more with --max-rows"
        size += sum(len(value) if isinstance(value, (str, bytes)) else 8 for value in row)
        if size > SQL_ANSWER_BYTES:
            return found, f"there are more than {SQL_ANSWER_BYTES} bytes: ask for less"
        found.append(row)
    return found, None
