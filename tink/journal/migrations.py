"""The schema's versions, through Alembic: upgrade at start, check, and new revisions for developers."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import Connection, MetaData

import tink
from tink.errors import StartupError
from tink.journal import revisions, store, views
from tink.journal import schema as tables
from tink.journal.database import Database
from tink.journal.revisions import Schema

METADATA: dict[Schema, MetaData] = {"journal": tables.metadata, "bodies": tables.bodies_metadata}


def upgrade(database: Database, *, whole: bool = True) -> None:
    """Brings the database to the newest schema, wholly or not at all. Raises StartupError for one that a
    newer Tink wrote, and for a journal whose tables are then not what its events say; DatabaseInUse for one
    that another worker writes to. `whole`: false for a part of a journal, from a bundle."""
    writer = database.writer()
    try:
        apply(writer.connection, database, whole=whole)
        writer.connection.commit()
    finally:
        writer.close()


def apply(connection: Connection, database: Database, *, whole: bool = True) -> None:
    """The same in the connection's transaction, which the caller commits."""
    schema = database.schema
    found = revisions.look(connection, schema)
    if found.kind == "head":
        return
    if found.kind in ("newer", "moved"):
        raise StartupError(str(found.problem(database.place)))
    database.begin_schema(connection, whole=whole)
    if schema == "journal":
        views.drop(connection)
    command.upgrade(_config(connection, schema), "head")
    if schema == "journal":
        views.create(connection)
    if schema == "journal" and found.kind == "older":
        # It may have rewritten any row: the one start that looks at all of them.
        wrong = store.check(connection, whole=whole)
        if wrong:
            connection.rollback()
            raise store.damaged(database.place, wrong)


def differences(connection: Connection, schema: Schema) -> list[str]:
    """What autogenerate would change: nothing, if the migrations make the schema of the code."""
    others: set[str] = set()  # that share the server's database
    for other in METADATA.keys() - {schema}:
        others |= {*METADATA[other].tables, revisions.version_table(other)}

    def mine(name: str | None, kind: str, _parents: object) -> bool:
        return kind != "table" or name not in others

    options = {
        "compare_type": True,
        "version_table": revisions.version_table(schema),
        "include_name": mine,
    }
    context = MigrationContext.configure(connection, opts=options)
    return [str(difference) for difference in compare_metadata(context, METADATA[schema])]


def _config(connection: Connection, schema: Schema) -> Config:
    package = Path(tink.__file__).parent
    folder = package / "migrations"  # in a wheel
    if not folder.is_dir():
        folder = package.parent / "migrations"  # in a checkout
    config = Config()
    config.set_main_option("script_location", str(folder))
    config.set_main_option("version_locations", str(folder / schema / "versions"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    config.attributes["metadata"] = METADATA[schema]
    config.attributes["version_table"] = revisions.version_table(schema)
    return config
