"""The schema's versions, through Alembic: upgrade at start, check, and new revisions for developers."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData

import tink
from tink.errors import StartupError
from tink.journal import revisions, schema, store, views
from tink.journal.revisions import HEADS, Database

METADATA: dict[Database, MetaData] = {"journal": schema.metadata, "bodies": schema.bodies_metadata}


def upgrade(connection: Connection, database: Database, path: Path, *, whole: bool = True) -> None:
    """Brings the database, the file `path`, to the newest schema, wholly or not at all. Raises StartupError
    for one that a newer Tink wrote, and for a journal whose tables are then not what its events say.
    `whole`: false for a part of a journal, from a bundle."""
    before = revisions.current(connection, database)
    if before == HEADS[database]:
        return
    if before is not None and before not in known(connection, database):
        raise StartupError(
            f"the {database} database has schema revision {before}, which this Tink "
            f"({tink.__version__}) does not know: it was written by a newer one; install that"
        )
    if connection.dialect.name == "sqlite":
        if not whole:  # a sampler's session may be missing
            connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
            connection.commit()
        # Its driver begins no transaction for DDL: a crash would leave half a schema behind.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    if database == "journal":
        views.drop(connection)
    command.upgrade(_config(connection, database), "head")
    if database == "journal":
        views.create(connection)
    if database == "journal" and before is not None:
        # It may have rewritten any row: the one start that looks at all of them.
        wrong = store.check(connection, whole=whole)
        if wrong:
            connection.rollback()
            raise store.damaged(path, wrong)
    connection.commit()


def known(connection: Connection, database: Database) -> list[str]:
    """The revisions of the migrations, the newest first."""
    script = ScriptDirectory.from_config(_config(connection, database))
    return [revision.revision for revision in script.walk_revisions()]


def differences(connection: Connection, database: Database) -> list[str]:
    """What autogenerate would change: nothing, if the migrations make the schema of the code."""
    options = {"compare_type": True, "version_table": revisions.version_table(database)}
    context = MigrationContext.configure(connection, opts=options)
    return [str(difference) for difference in compare_metadata(context, METADATA[database])]


def _config(connection: Connection, database: Database) -> Config:
    package = Path(tink.__file__).parent
    folder = package / "migrations"  # in a wheel
    if not folder.is_dir():
        folder = package.parent / "migrations"  # in a checkout
    config = Config()
    config.set_main_option("script_location", str(folder))
    config.set_main_option("version_locations", str(folder / database / "versions"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    config.attributes["metadata"] = METADATA[database]
    config.attributes["version_table"] = revisions.version_table(database)
    return config
