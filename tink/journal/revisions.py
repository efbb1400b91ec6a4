"""Which revision of its schema a database has. Alembic notes it there; to read it takes no Alembic, which
is slow to import: a start without a migration does without."""

from __future__ import annotations

from typing import Literal

from sqlalchemy import Connection, inspect

Database = Literal["journal", "bodies"]

# What the code knows: the newest of migrations/, which make the tables of journal/schema.py.
HEADS: dict[Database, str] = {"journal": "0002", "bodies": "0001"}


def current(connection: Connection, database: Database) -> str | None:
    """None for an empty database."""
    table = version_table(database)
    if not inspect(connection).has_table(table):
        return None
    found = connection.exec_driver_sql(f"SELECT version_num FROM {table}").scalar()  # noqa: S608
    return None if found is None else str(found)


def version_table(database: Database) -> str:
    """Of its own for each: on PostgreSQL the two share a server."""
    return f"{database}_schema_version"
