"""An SQLite file, opened so that a commit means stable storage. What was asked for is read back: a file
system or a build that does not honour it stops the start."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event

from tink.errors import JournalUnavailable, StartupError
from tink.home import Home
from tink.journal.database import JSON, Database, Writer, driver_error
from tink.journal.revisions import Schema
from tink.limits import (
    LOCK_SECONDS,
    READ_CONNECTIONS,
    READ_LOCK_SECONDS,
    READ_STATEMENTS,
    SHOWN_PROBLEMS,
)

# pragma -> what must be read back. FULL: every commit is synced, so it survives power loss too.
_WRITER_PRAGMAS: dict[str, tuple[str, object]] = {
    "journal_mode": ("WAL", "wal"),
    "synchronous": ("FULL", 2),
    "foreign_keys": ("ON", 1),
    # Some builds write zeros over all that is deleted: for bodies that is ten times the work.
    "secure_delete": ("FAST", 2),
    # Another process that holds a lock is waited for so long (milliseconds).
    "busy_timeout": (f"{int(LOCK_SECONDS * 1000)}", int(LOCK_SECONDS * 1000)),
}


class SQLite(Database):
    """A file of the home, which one process has locked."""

    contended = False

    def __init__(self, path: Path, schema: Schema) -> None:
        self._path, self.place, self.schema = path, str(path), schema

    def exists(self) -> bool:
        return self._path.is_file()

    def writer(self) -> Writer:
        check_writable(self._path)
        return _FileWriter(self._path)

    def reader(self) -> Engine:
        return reader_engine(self._path)

    def begin_snapshot(self, connection: Connection) -> None:
        # The driver opens no transaction for reads.
        connection.exec_driver_sql("BEGIN")

    def unbounded(self, connection: Connection) -> None:
        """No file ends a transaction."""

    def begin_schema(self, connection: Connection, *, whole: bool) -> None:
        if not whole:  # a sampler's session may be missing
            connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
            connection.commit()
        # The driver begins no transaction for DDL: a crash would leave half a schema behind.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    def settle(self, connection: Connection) -> None:
        """The copy is not in its place yet, and all in one transaction it would be written twice."""
        connection.commit()

    def check_file(self, connection: Connection, *, quick: bool) -> tuple[str, list[str]]:
        pragma = "quick_check" if quick else "integrity_check"
        answers = connection.exec_driver_sql(f"PRAGMA {pragma}({SHOWN_PROBLEMS})").scalars().all()
        problems = [] if answers == ["ok"] else [str(answer) for answer in answers]
        for table, row, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check"):
            problems.append(f"row {row} of {table} names a row that {parent} does not have")
        return f"SQLite's {pragma}, and foreign keys", problems

    def bytes(self) -> int:
        return sum(file.stat().st_size for file in files(self._path) if file.exists())

    def is_damage(self, error: JournalUnavailable) -> bool:
        code = getattr(driver_error(error.__cause__), "sqlite_errorcode", None) or 0
        return code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class _FileWriter(Writer):
    """SQLite goes on writing to a file that was deleted or replaced meanwhile, though nobody will ever read
    that again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._engine = writer_engine(path)
        self.connection = self._engine.connect()
        self._opened = self._present()

    def check(self) -> None:
        if self._present() != self._opened:
            raise JournalUnavailable(
                f"{self._path} or its -wal file was deleted or replaced while the worker ran: put it back, "
                "or restore a backup"
            )

    def beat(self) -> None:
        """Nobody waits for a file."""

    def close(self) -> None:
        self.connection.close()
        self._engine.dispose()

    def _present(self) -> list[tuple[int, int] | None]:
        return [_identity(path) for path in (self._path, _beside(self._path, "wal"))]


def writer_engine(path: Path) -> Engine:
    """The one writer's engine. Raises StartupError if durability cannot be had."""
    engine = create_engine(f"sqlite:///{path}", hide_parameters=True, pool_size=1, max_overflow=0, **JSON)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        for pragma, (value, expected) in _WRITER_PRAGMAS.items():
            cursor.execute(f"PRAGMA {pragma}={value}")
            found = cursor.execute(f"PRAGMA {pragma}").fetchone()[0]
            if found != expected:
                raise StartupError(
                    f"{path}: SQLite's {pragma} is {found!r}, not {expected!r}: this file system cannot "
                    "keep the journal durable; put TINK_HOME on a local disk"
                )
        cursor.close()

    return engine


def reader_engine(path: Path) -> Engine:
    """Read-only connections beside the writer's; they never block it."""
    engine = create_engine(
        f"sqlite:///file:{quote(str(path))}?mode=ro&uri=true",
        hide_parameters=True,
        pool_size=READ_CONNECTIONS,
        max_overflow=0,
        connect_args={"cached_statements": READ_STATEMENTS},
        **JSON,
    )

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: object) -> None:
        connection.execute("PRAGMA query_only=1")
        connection.execute(f"PRAGMA busy_timeout={READ_LOCK_SECONDS * 1000:.0f}")

    return engine


def check_writable(path: Path) -> None:
    """Raises StartupError for a file that may only be read. SQLite would open it without a word, and make
    others beside it that may only be read too."""
    for file in files(path):
        if file.exists() and not os.access(file, os.W_OK):
            raise StartupError(f"{file} cannot be written: it is read-only")


def path_of(home: Home, schema: Schema) -> Path:
    """Which of the home's files that database is."""
    return {"journal": home.journal, "bodies": home.bodies}[schema]


def files(path: Path) -> tuple[Path, ...]:
    """A database file, and those that SQLite keeps beside it."""
    return path, _beside(path, "wal"), _beside(path, "shm")


def _beside(path: Path, kind: str) -> Path:
    """The file that SQLite keeps beside the database."""
    return path.with_name(f"{path.name}-{kind}")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
