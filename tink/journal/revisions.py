"""Which revision of its schema a database has. Alembic notes it there; to read it takes no Alembic, which
is slow to import: a start without a migration does without."""

from __future__ import annotations

from typing import Literal

from sqlalchemy import Connection, inspect

Schema = Literal["journal", "bodies"]

# What the code knows: the newest of migrations/, which make the tables of journal/schema.py.
HEADS: dict[Schema, str] = {"journal": "0002", "bodies": "0001"}

# In the place of a revision, with a time behind it: what 'tink db move' has taken elsewhere.
MOVED = "moved-"


def current(connection: Connection, schema: Schema) -> str | None:
    """None for an empty database."""
    table = version_table(schema)
    if not inspect(connection).has_table(table):
        return None
    found = connection.exec_driver_sql(f"SELECT version_num FROM {table}").scalar()  # noqa: S608
    return None if found is None else str(found)


def version_table(schema: Schema) -> str:
    """Of its own for each: on PostgreSQL the two share a server."""
    return f"{schema}_schema_version"


def moved(revision: str, place: str) -> str | None:
    """What to say of a database that is not in use any more; None for any other."""
    if not revision.startswith(MOVED):
        return None
    return (
        f"the journal that was in {place} was moved elsewhere ({revision}): unset TINK_DATABASE_URL, or "
        "name the database that it is in now; if 'tink db move' was interrupted, run it again"
    )
