"""A backup of a home's files while its worker writes to them: SQLite's online backup, both at one moment.
A server has its own (docs/operations.md)."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Connection

from tink import files
from tink.errors import StartupError, UserError
from tink.home import Home
from tink.journal import bodies, chain, queries, revisions
from tink.journal.database import database
from tink.journal.reader import open_journal, open_snapshot
from tink.limits import BACKUP_PAGES, BACKUP_TRIES

# So many pages of so many are copied.
Told = Callable[[int, int], None]


class Backup(NamedTuple):
    head: chain.Head
    bytes: int


def back_up(home: Home, folder: Path, told: Callable[[str], Told]) -> Backup:
    """Copies the journal and the bodies into a new folder, whole or not at all: it is a home, but for the
    artifacts. Blocks. UserError for a journal on a server, and for a folder that is there; StartupError for
    what cannot be read or written. `told`: of which file -> what is told as it goes on."""
    if home.database_url:
        raise UserError(
            f"the journal is in {database(home, 'journal').place}: its backups are made with pg_dump or "
            "pg_basebackup (docs/operations.md)"
        )
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: name a new folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tink-backup-", dir=folder.parent) as scratch:
            made = Home(Path(scratch) / "home")
            made.root.mkdir(mode=0o700)
            with _one_moment(home) as (journal, stored):
                head = chain.head(journal)
                for connection, path in ((journal, made.journal), (stored, made.bodies)):
                    _copy(connection, path, told(path.name))
            files.sync_tree(made.root)
            size = sum(path.stat().st_size for path in made.root.iterdir())
            made.root.rename(folder)
        files.sync_names(folder)
    except (OSError, sqlite3.Error) as error:
        raise StartupError(f"{folder} cannot be written: {error}") from error
    return Backup(head, size)


@contextmanager
def _one_moment(home: Home) -> Iterator[tuple[Connection, Connection]]:
    """The journal, and all bodies that it needs: between two looks retention may have deleted some."""
    for left in reversed(range(BACKUP_TRIES)):
        with open_journal(home) as journal, open_snapshot(database(home, "bodies")) as found:
            revisions.look(found, "bodies")  # its moment is that of the first read
            due = queries.bodies_due(journal)
            if left and bodies.stored(bodies.shelves(journal, found), due) != due.keys():
                continue
            yield journal, found
            return


def _copy(connection: Connection, path: Path, told: Told) -> None:
    """As the connection sees it: in its transaction, which nobody else's write restarts."""
    source = connection.connection.dbapi_connection
    assert isinstance(source, sqlite3.Connection)
    with closing(sqlite3.connect(path)) as target:
        source.backup(
            target,
            pages=BACKUP_PAGES,
            progress=lambda _, remaining, total: told(total - remaining, total),
        )
    path.chmod(0o600)
