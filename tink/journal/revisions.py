"""Which revision of its schema a database has, and what that means. Alembic notes it there; to read it
takes no Alembic, which is slow to import: a start without a migration does without."""

from __future__ import annotations

from typing import Literal, NamedTuple

from sqlalchemy import Connection, inspect

import tink

Schema = Literal["journal", "bodies"]
SCHEMAS: tuple[Schema, ...] = ("journal", "bodies")

# What the code knows: the newest of migrations/, which make the tables of journal/schema.py. They are
# numbered, so of two the newer one comes later as a text too.
HEADS: dict[Schema, str] = {"journal": "0003", "bodies": "0001"}

# In the place of a revision, with a time behind it: what 'tink db move' has taken elsewhere.
MOVED = "moved-"


class Problem(NamedTuple):
    """What is wrong, and what to do about it."""

    detail: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.detail}: {self.remedy}"


class Found(NamedTuple):
    """`revision` None: there are no tables yet. `kind`: which it is to this Tink; `moved`: the database is
    not in use any more."""

    schema: Schema
    revision: str | None
    kind: Literal["none", "older", "head", "newer", "moved"]

    def problem(self, place: str) -> Problem | None:
        """Why this Tink cannot use the database as it is; None if it can. `place`: where that is."""
        has = f"{place} has schema revision {self.revision or 'none'} of the {self.schema}"
        match self.kind:
            case "head":
                return None
            case "moved":
                return Problem(
                    f"the journal that was in {place} was moved elsewhere ({self.revision})",
                    "unset TINK_DATABASE_URL, or name the database that it is in now; if 'tink db move' "
                    "was interrupted, run it again",
                )
            case "newer":
                return Problem(
                    f"{has}, which this Tink ({tink.__version__}) does not know",
                    "it was written by a newer one; install that",
                )
        return Problem(f"{has}, and this Tink has {HEADS[self.schema]}", "run 'tink db upgrade'")


def look(connection: Connection, schema: Schema) -> Found:
    """At the revision that the database notes."""
    table, revision = version_table(schema), None
    if inspect(connection).has_table(table):
        revision = connection.exec_driver_sql(f"SELECT version_num FROM {table}").scalar()  # noqa: S608
    if revision is None:
        return Found(schema, None, "none")
    revision = str(revision)
    if revision.startswith(MOVED):
        return Found(schema, revision, "moved")
    if revision == HEADS[schema]:
        return Found(schema, revision, "head")
    return Found(schema, revision, "older" if revision < HEADS[schema] else "newer")


def version_table(schema: Schema) -> str:
    """Of its own for each: on PostgreSQL the two share a server."""
    return f"{schema}_schema_version"
