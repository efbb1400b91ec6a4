"""Migrations make the schema of the code, once, and refuse what a newer Tink wrote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Connection

from tests.unit.journal.journal_kit import new_home
from tink.errors import StartupError
from tink.journal import migrations
from tink.journal.database import writer_engine
from tink.journal.journal import prepare
from tink.journal.migrations import Database

both = pytest.mark.parametrize("database", ["journal", "bodies"])


@contextmanager
def _connected(path: Path) -> Iterator[Connection]:
    engine = writer_engine(path)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


@both
def test_an_empty_database_becomes_the_schema_of_the_code(tmp_path: Path, database: Database) -> None:
    with _connected(tmp_path / "db.sqlite") as connection:
        assert migrations.version(connection, database).current is None
        assert migrations.differences(connection, database) != []
        before = migrations.upgrade(connection, database)
        assert before.current is None
        assert migrations.version(connection, database).current == before.head
        assert migrations.differences(connection, database) == []


@both
def test_an_upgrade_of_the_newest_schema_changes_nothing(tmp_path: Path, database: Database) -> None:
    path = tmp_path / "db.sqlite"
    with _connected(path) as connection:
        migrations.upgrade(connection, database)
        schema = connection.exec_driver_sql("SELECT name, sql FROM sqlite_master ORDER BY 1").fetchall()
    before = path.read_bytes()
    with _connected(path) as connection:
        version = migrations.upgrade(connection, database)
        assert version.current == version.head
        assert (
            connection.exec_driver_sql("SELECT name, sql FROM sqlite_master ORDER BY 1").fetchall()
            == schema
        )
    assert path.read_bytes() == before


@both
def test_a_schema_of_a_newer_tink_is_refused_and_left_alone(tmp_path: Path, database: Database) -> None:
    home = new_home(tmp_path)
    path = getattr(home, database)
    with _connected(path) as connection:
        connection.exec_driver_sql(f"UPDATE {database}_schema_version SET version_num = '9999'")
        connection.commit()
    before = path.read_bytes()
    with pytest.raises(StartupError, match=r"revision 9999.*written by a newer one; install that"):
        prepare(home)
    assert path.read_bytes() == before


@both
def test_the_differences_are_seen(tmp_path: Path, database: Database) -> None:
    """So that an empty list means something."""
    with _connected(tmp_path / "db.sqlite") as connection:
        migrations.upgrade(connection, database)
        table = {"journal": "jobs", "bodies": "bodies"}[database]
        connection.exec_driver_sql(f"ALTER TABLE {table} ADD COLUMN surplus TEXT")
        assert "surplus" in str(migrations.differences(connection, database))


@both
def test_every_constraint_of_the_code_is_in_the_database(tmp_path: Path, database: Database) -> None:
    """Alembic compares no partial-index conditions and no foreign keys of SQLite: their text is compared
    with a database that `create_all` makes."""
    statements: list[set[str]] = []
    for name in ("migrated", "made"):
        with _connected(tmp_path / f"{name}.sqlite") as connection:
            if name == "migrated":
                migrations.upgrade(connection, database)
            else:
                migrations.METADATA[database].create_all(connection)
            found = connection.exec_driver_sql(
                "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE '%schema_version'"
            )
            statements.append({" ".join(str(sql).split()) for sql in found.scalars()})
    migrated, made = statements
    index = lambda found: {sql for sql in found if "INDEX" in sql}  # noqa: E731
    assert index(migrated) == index(made)
    assert {_parts(sql) for sql in migrated - index(migrated)} == {
        _parts(sql) for sql in made - index(made)
    }


def _parts(sql: str) -> tuple[str, frozenset[str]]:
    """A CREATE TABLE without the order of its columns and constraints."""
    head, _, body = sql.partition("(")
    parts, depth, current = [], 0, ""
    for letter in body.rstrip().removesuffix(")"):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += letter
    return head.strip(), frozenset([*parts, current.strip()])
