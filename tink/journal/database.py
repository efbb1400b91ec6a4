"""What the journal asks of a database, whichever it is: an SQLite file (sqlite.py) or a PostgreSQL server
(postgres.py). A worker has two: `journal`, and beside it `bodies` with a writer of its own."""

from __future__ import annotations

import contextlib
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import msgspec
from sqlalchemy import Connection, Engine, Table
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from tink.errors import JournalUnavailable, StartupError
from tink.home import Home
from tink.journal.revisions import Schema
from tink.limits import LOCK_SECONDS, SQL_KEYS

K = TypeVar("K")

# msgspec's JSON is exact for floats, like the standard library's, and several times faster.
JSON: dict[str, Any] = {
    "json_serializer": lambda value: msgspec.json.encode(value).decode(),
    "json_deserializer": msgspec.json.decode,
}


class Writer(ABC):
    """The one connection that writes. All of it blocks."""

    connection: Connection

    @abstractmethod
    def check(self) -> None:
        """Raises JournalUnavailable if what is written here would not be found again."""

    @abstractmethod
    def beat(self) -> None:
        """Between transactions, a sign of life: whoever waits takes the place of one that is silent. Raises
        JournalUnavailable if it is lost."""

    @abstractmethod
    def close(self) -> None: ...


class Database(ABC):
    """One of the two databases of a worker. `place`: where it is, for people; without a password. All of it
    blocks."""

    # Whether a worker that waits for it takes it from one that is silent.
    contended: ClassVar[bool]
    schema: Schema
    place: str

    @abstractmethod
    def exists(self) -> bool:
        """Whether there is one. StartupError if that cannot be told."""

    @abstractmethod
    def writer(self) -> Writer:
        """Opened so that a commit means stable storage, which is read back. StartupError if that cannot be
        had, and DatabaseInUse if another worker has it."""

    @abstractmethod
    def reader(self) -> Engine:
        """Connections that only read; the writer is never held up by one."""

    @abstractmethod
    def begin_snapshot(self, connection: Connection) -> None:
        """From now on every read on the connection, of `reader`, sees the same moment."""

    @abstractmethod
    def unbounded(self, connection: Connection) -> None:
        """The writer's transaction may take as long as it does, and be silent meanwhile."""

    @abstractmethod
    def begin_schema(self, connection: Connection, *, whole: bool) -> None:
        """Of the writer's: in its next transaction the schema is changed, wholly or not at all. `whole`:
        false for a part of a journal, from a bundle."""

    @abstractmethod
    def settle(self, connection: Connection) -> None:
        """In the middle of what is copied here: what there is of it may be committed."""

    @abstractmethod
    def check_file(self, connection: Connection, *, quick: bool) -> tuple[str, list[str]]:
        """On a connection of `reader`, below the tables: what was looked at, and what is wrong there."""

    @abstractmethod
    def bytes(self) -> int:
        """What it takes of a disk."""

    @abstractmethod
    def is_damage(self, error: JournalUnavailable) -> bool:
        """Whether the reason is what is on the disk: another page may be whole."""


def database(home: Home, schema: Schema) -> Database:
    """Of the two databases of a home the one with that schema."""
    if home.database_url:
        from tink.journal.postgres import PostgreSQL  # an extra

        return PostgreSQL(home.database_url, schema)
    from tink.journal.sqlite import SQLite, path_of

    return SQLite(path_of(home, schema), schema)


def upsert(dialect: str, table: Table) -> Any:
    """An INSERT ... ON CONFLICT, which SQLAlchemy has for each of the two apart."""
    return {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[dialect](table)


@contextlib.contextmanager
def database_errors(what: str) -> Iterator[None]:
    """SQLAlchemy's errors as JournalUnavailable, without statement or parameters."""
    try:
        yield
    except SQLAlchemyError as error:
        cause = driver_error(error)
        if getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
            what += f", another process has held a lock for {LOCK_SECONDS:g} s"
        raise JournalUnavailable(f"{what}: {one_line(cause)}", may_pass=_may_pass(cause)) from error


@contextlib.contextmanager
def reading(place: str) -> Iterator[None]:
    """The same as StartupError, around what only reads: whoever asks can do nothing but say so."""
    try:
        yield
    except SQLAlchemyError as error:
        cause = driver_error(error)
        told = f"{place} cannot be read: {one_line(cause)}"
        raise StartupError(told, may_pass=_may_pass(cause)) from error


def driver_error(error: BaseException | None) -> BaseException | None:
    """What the driver has raised, out of SQLAlchemy's error; any other one as it is."""
    return getattr(error, "orig", None) or error


def _may_pass(cause: BaseException | None) -> bool:
    """As far as the database's own module has said so of it."""
    return getattr(cause, "may_pass", False)


def batched(keys: Sequence[K], size: int = SQL_KEYS) -> Iterator[Sequence[K]]:
    """As many of them at a time as one question may have, or `size`."""
    for start in range(0, len(keys), size):
        yield keys[start : start + size]


def one_line(error: object) -> str:
    """What a driver says may have many."""
    return " ".join(str(error).split())
