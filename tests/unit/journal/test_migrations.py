"""Migrations make the schema of the code, once, and refuse what a newer Tink wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import Connection
from trio.testing import MockClock

import tink
from tests.simulation import golden
from tests.unit.journal.journal_kit import new_home, opened, session
from tink.domain.events import JobAccepted, JobDone, Subject
from tink.errors import StartupError
from tink.home import Home
from tink.journal import chain, migrations, revisions, store, views
from tink.journal.journal import prepare
from tink.journal.revisions import Schema
from tink.journal.sqlite import SQLite, writer_engine
from tink.replay import bundle

pytestmark = pytest.mark.on_files

both = pytest.mark.parametrize("database", ["journal", "bodies"])


@contextmanager
def _connected(path: Path) -> Iterator[Connection]:
    engine = writer_engine(path)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


@both
def test_an_empty_database_becomes_the_schema_of_the_code(tmp_path: Path, database: Schema) -> None:
    path = tmp_path / "db.sqlite"
    with _connected(path) as connection:
        assert revisions.look(connection, database).revision is None
        assert migrations.differences(connection, database) != []
    migrations.upgrade(SQLite(path, database))
    with _connected(path) as connection:
        assert revisions.look(connection, database).revision == revisions.HEADS[database]
        assert migrations.differences(connection, database) == []


@both
def test_an_upgrade_of_the_newest_schema_changes_nothing(tmp_path: Path, database: Schema) -> None:
    path = tmp_path / "db.sqlite"
    migrations.upgrade(SQLite(path, database))
    with _connected(path) as connection:
        schema = connection.exec_driver_sql("SELECT name, sql FROM sqlite_master ORDER BY 1").fetchall()
    before = path.read_bytes()
    migrations.upgrade(SQLite(path, database))
    with _connected(path) as connection:
        assert (
            connection.exec_driver_sql("SELECT name, sql FROM sqlite_master ORDER BY 1").fetchall()
            == schema
        )
    assert path.read_bytes() == before


@both
def test_a_schema_of_a_newer_tink_is_refused_and_left_alone(tmp_path: Path, database: Schema) -> None:
    home = new_home(tmp_path)
    path = getattr(home, database)
    with _connected(path) as connection:
        connection.exec_driver_sql(f"UPDATE {database}_schema_version SET version_num = '9999'")
        connection.commit()
    before = path.read_bytes()
    with pytest.raises(StartupError, match=r"revision 9999.*written by a newer one; install that"):
        prepare(home)
    assert path.read_bytes() == before


def _made(path: Path, database: Schema) -> list[str]:
    """The revisions that there are migrations for, the newest first."""
    with _connected(path) as connection:
        script = ScriptDirectory.from_config(migrations._config(connection, database))
        return [revision.revision for revision in script.walk_revisions()]


@both
def test_the_head_that_the_code_knows_is_the_newest_migration(tmp_path: Path, database: Schema) -> None:
    made = _made(tmp_path / "db.sqlite", database)
    assert made[0] == revisions.HEADS[database]
    assert made == sorted(made, reverse=True)  # by which an older one is told from a newer one


def test_a_start_without_a_migration_does_not_wait_for_alembic(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; import tink.cli.main, tink.cli.serve\n"
        "from tink.home import Home; from tink.journal.journal import prepare\n"
        "prepare(Home(Path(sys.argv[1])))\n"
        "sys.exit('alembic' in sys.modules)"
    )
    for empty in (False, True):
        home = new_home(tmp_path / str(empty), empty=empty)
        done = subprocess.run([sys.executable, "-c", script, str(home.root)])
        assert done.returncode == empty


# -- a migration of tomorrow ------------------------------------------------------------------------

MIGRATION = """
from alembic import op
revision, down_revision = "9000", "{head}"
def upgrade():
    op.execute("CREATE TABLE added (x int)")
    op.execute("UPDATE sessions SET sdk_version = '{version}' WHERE session_id = 's1'")
"""


@pytest.fixture
def write_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], object]:
    """Writes the journal's next migration, which this Tink then has."""
    config, head = migrations._config, revisions.HEADS["journal"]

    def longer(connection: Connection, database: Schema) -> Any:
        made = config(connection, database)
        if database == "journal":
            here = made.get_main_option("version_locations")
            made.set_main_option("version_locations", f"{here}{os.pathsep}{tmp_path}")
        return made

    def write(version: str) -> None:
        (tmp_path / "9000_next.py").write_text(MIGRATION.format(version=version, head=head))
        monkeypatch.setattr(migrations, "_config", longer)
        monkeypatch.setitem(revisions.HEADS, "journal", "9000")

    return write


async def _with_history(folder: Path) -> Home:
    home = new_home(folder)
    async with opened(home) as journal:
        await journal.append(session(1, sdk_version="5"))
        await journal.append(*(session(number) for number in range(2, 20)))
    return home


def _tables(home: Home) -> set[str]:
    with _connected(home.journal) as connection:
        return set(connection.exec_driver_sql("SELECT name FROM sqlite_master").scalars())


async def test_a_start_after_a_migration_looks_at_all_of_the_journal(
    autojump_clock: MockClock,
    tmp_path: Path,
    write_next: Callable[[str], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And a migration that leaves something else than what the events say has not been."""
    monkeypatch.setattr(store, "CHECKED_EVENTS", 2)
    home = await _with_history(tmp_path / "home")
    # Of another length than the next one: Python tells source files apart by their size and second.
    write_next("666")
    with pytest.raises(StartupError, match=r"damaged.*1 differences.*sessions\['s1'\].*restore a backup"):
        prepare(home)
    assert "added" not in _tables(home)
    with _connected(home.journal) as connection:
        assert revisions.look(connection, "journal").revision not in (None, "9000")

    write_next("5")
    async with opened(home) as journal:
        assert len(journal.ledger.sessions) == 19
    assert "added" in _tables(home)


def test_a_bundle_of_an_older_tink_is_read(tmp_path: Path, write_next: Callable[[str], object]) -> None:
    """Though it is no whole journal, and has samples whose sessions it has not."""
    home = Home(tmp_path / "home")
    golden.read(golden.GOLDEN / tink.__version__ / "trainer", home)
    with _connected(home.journal) as connection:
        query = "SELECT model_id FROM models ORDER BY steps DESC"
        model = str(connection.exec_driver_sql(query).scalars().first())
    bundle.write(home, home.artifacts, model, tmp_path / "run.tink", redact=False, now=5.0)
    write_next("5")
    with bundle.opened(tmp_path / "run.tink") as carried:
        assert "added" in _tables(carried)


@both
def test_the_differences_are_seen(tmp_path: Path, database: Schema) -> None:
    """So that an empty list means something."""
    path = tmp_path / "db.sqlite"
    migrations.upgrade(SQLite(path, database))
    with _connected(path) as connection:
        table = {"journal": "jobs", "bodies": "bodies"}[database]
        connection.exec_driver_sql(f"ALTER TABLE {table} ADD COLUMN surplus TEXT")
        assert "surplus" in str(migrations.differences(connection, database))


@both
def test_every_constraint_of_the_code_is_in_the_database(tmp_path: Path, database: Schema) -> None:
    """Alembic compares no partial-index conditions and no foreign keys of SQLite: their text is compared
    with a database that `create_all` makes."""
    statements: list[set[str]] = []
    for name in ("migrated", "made"):
        path = tmp_path / f"{name}.sqlite"
        if name == "migrated":
            migrations.upgrade(SQLite(path, database))
        with _connected(path) as connection:
            if name == "made":
                migrations.METADATA[database].create_all(connection)
            found = connection.exec_driver_sql(
                "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND type <> 'view' "
                "AND name NOT LIKE '%schema_version'"
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


# -- from every revision that was ever released -----------------------------------------------------

# What takes a journal of this Tink back to that revision.
BACK = {
    "0002": ["DROP TABLE short_bodies"],
    "0001": [
        "DROP TABLE short_bodies",
        *(f"DROP VIEW {name}" for name in views.VIEWS),
        "DROP TABLE steps",
        "DROP TABLE usage",
        "DROP INDEX ix_jobs_model_id_step",
        "DROP INDEX ix_jobs_retried",
        "DROP INDEX ix_adapters_created_at",
        "DROP INDEX ix_jobs_submitted_at",
        "CREATE INDEX ix_jobs_submitted_at ON jobs (submitted_at)",
        "DROP INDEX ix_checkpoints_directory",
        "ALTER TABLE events DROP COLUMN hash",
        "ALTER TABLE models DROP COLUMN steps",
        *(f"ALTER TABLE {table} DROP COLUMN step" for table in ("jobs", "adapters", "checkpoints")),
    ],
}


@pytest.mark.parametrize("revision", BACK)
async def test_a_journal_of_an_older_revision_becomes_what_its_events_say(
    autojump_clock: MockClock, tmp_path: Path, revision: str
) -> None:
    home = new_home(tmp_path)
    who = Subject(tenant="t", session_id="s1", model_id="m", job_id="m:0")
    accepted = JobAccepted(op="create_model", seq_id=0, model_seq_id=0, request="{}")
    sample = Subject(tenant="t", session_id="s1", job_id="x:0")
    async with opened(home) as journal:
        await journal.append(session(1))
        await journal.append((who, accepted), (who, JobDone(tokens_in=5, run_ms=0.1)))
        await journal.append((sample, JobAccepted(op="sample", seq_id=0)))
        await journal.append((sample, JobDone(tokens_in=7, tokens_out=9, run_ms=0.2)))
    with _connected(home.journal) as connection:
        for statement in BACK[revision]:
            connection.exec_driver_sql(statement)
        connection.exec_driver_sql(f"UPDATE journal_schema_version SET version_num = '{revision}'")
        connection.commit()

    prepare(home)
    with _connected(home.journal) as connection:
        assert migrations.differences(connection, "journal") == []
        assert store.check(connection) == []
        assert list(chain.breaks(connection)) == []
        (usage,) = connection.exec_driver_sql("SELECT * FROM v_usage").mappings()
    assert usage["tokens"] == 5 + 7 + 9
    async with opened(home) as journal:
        await journal.append(session(2))
    with _connected(home.journal) as connection:
        assert list(chain.breaks(connection)) == []


def test_every_revision_but_the_last_has_its_way_back(tmp_path: Path) -> None:
    assert _made(tmp_path / "db.sqlite", "journal")[1:] == sorted(BACK, reverse=True)
