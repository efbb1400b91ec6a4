"""A home's databases as a command reads them: read-only, at one moment, without a lock. Nothing here makes
a folder or a file, and the worker's writer is never waited for nor held up."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from sqlalchemy import Connection

from tink.errors import UNREADABLE, StartupError
from tink.home import Home
from tink.journal import revisions
from tink.journal.database import Database, database, reading


@contextlib.contextmanager
def open_snapshot(database: Database) -> Iterator[Connection]:
    """A connection on which every read sees the same moment. StartupError, in one line, for a database that
    cannot be read; what SQLAlchemy and msgspec raise in the body becomes that too."""
    engine = database.reader()
    try:
        with reading(database.place), engine.connect() as connection:
            database.begin_snapshot(connection)
            yield connection
    except UNREADABLE as error:
        raise StartupError(
            f"{database.place} holds what this Tink does not understand ({error}): "
            "'tink db check' tells more"
        ) from error
    finally:
        engine.dispose()


@contextlib.contextmanager
def open_journal(home: Home) -> Iterator[Connection]:
    """The journal of a home, whose schema is the one that this Tink knows. StartupError if not."""
    journal = database(home, "journal")
    with open_snapshot(journal) as connection:
        if problem := revisions.look(connection, "journal").problem(journal.place):
            raise StartupError(str(problem))
        yield connection
