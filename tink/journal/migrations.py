"""The schema's versions, through Alembic: upgrade at start, check, and new revisions for developers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData

import tink
from tink.errors import StartupError
from tink.journal import schema

Database = Literal["journal", "bodies"]

METADATA: dict[Database, MetaData] = {"journal": schema.metadata, "bodies": schema.bodies_metadata}


class Version(NamedTuple):
    """`current` is None for an empty database."""

    current: str | None
    head: str


def upgrade(connection: Connection, database: Database) -> Version:
    """Brings the database to the newest schema, wholly or not at all. Raises StartupError for one that a
    newer Tink wrote."""
    before = version(connection, database)
    script = ScriptDirectory.from_config(_config(connection, database))
    if before.current is not None and before.current not in {r.revision for r in script.walk_revisions()}:
        raise StartupError(
            f"the {database} database has schema revision {before.current}, which this Tink "
            f"({tink.__version__}) does not know: it was written by a newer one; install that"
        )
    if before.current != before.head:
        if connection.dialect.name == "sqlite":
            # Its driver begins no transaction for DDL: a crash would leave half a schema behind.
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        command.upgrade(_config(connection, database), "head")
        connection.commit()
    return before


def version(connection: Connection, database: Database) -> Version:
    head = ScriptDirectory.from_config(_config(connection, database)).get_current_head()
    assert head is not None, "the package has no migrations"
    return Version(_context(connection, database).get_current_revision(), head)


def differences(connection: Connection, database: Database) -> list[str]:
    """What autogenerate would change: nothing, if the migrations make the schema of the code."""
    context = _context(connection, database)
    return [str(difference) for difference in compare_metadata(context, METADATA[database])]


def _context(connection: Connection, database: Database) -> MigrationContext:
    options = {"compare_type": True, "version_table": _version_table(database)}
    return MigrationContext.configure(connection, opts=options)


def _version_table(database: Database) -> str:
    """Of its own for each: on PostgreSQL the two share a server."""
    return f"{database}_schema_version"


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
    config.attributes["version_table"] = _version_table(database)
    return config
