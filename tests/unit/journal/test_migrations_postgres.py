"""What test_migrations.py promises of files holds on PostgreSQL: migrations make the schema of the code,
each wholly or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, text
from trio.testing import MockClock

from tests.postgres import PostgresServer
from tests.unit.journal import test_migrations
from tests.unit.journal.journal_kit import new_home, on_postgres, opened, session
from tests.unit.journal.test_migrations import both
from tink.domain.events import JobAccepted, JobDone, Subject
from tink.errors import DatabaseInUse, StartupError
from tink.home import Home
from tink.journal import chain, migrations, revisions, store, views
from tink.journal.journal import prepare
from tink.journal.postgres import PostgreSQL
from tink.journal.revisions import Schema

# The promises of files are those of test_migrations.py.
pytestmark = pytest.mark.on_files

write_next = test_migrations.write_next


@pytest.fixture(autouse=True)
def _here(postgres: PostgresServer) -> Iterator[None]:
    with on_postgres(postgres):
        yield


@contextlib.contextmanager
def connected(url: str) -> Iterator[Connection]:
    """Without the writer's lock."""
    engine = PostgreSQL(url, "journal").engine("test")
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


# Everything that a schema consists of, as the server itself says it. A constraint has the name that the
# server gave it where the code gives none.
DEFINED = """
SELECT 'column', table_name || '.' || column_name,
       concat_ws(' ', data_type, column_default, 'null: ' || is_nullable)
FROM information_schema.columns WHERE table_schema = 'public'
UNION ALL
SELECT 'index', indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'
UNION ALL
SELECT 'constraint', conrelid::regclass || '.' || conname, pg_get_constraintdef(oid)
FROM pg_constraint WHERE connamespace = 'public'::regnamespace
UNION ALL
SELECT 'view', viewname, definition FROM pg_views WHERE schemaname = 'public'
"""


def defined(connection: Connection) -> dict[tuple[str, str], str]:
    found = connection.execute(text(DEFINED)).all()
    return {(kind, name): definition for kind, name, definition in found if "schema_version" not in name}


@both
def test_an_empty_database_becomes_the_schema_of_the_code(postgres_url: str, database: Schema) -> None:
    with connected(postgres_url) as connection:
        assert revisions.look(connection, database).revision is None
        assert migrations.differences(connection, database) != []
    migrations.upgrade(PostgreSQL(postgres_url, database))
    with connected(postgres_url) as connection:
        assert revisions.look(connection, database).revision == revisions.HEADS[database]
        assert migrations.differences(connection, database) == []


def test_both_in_one_database_differ_in_nothing(postgres_url: str, tmp_path: Path) -> None:
    prepare(Home(tmp_path, postgres_url))
    with connected(postgres_url) as connection:
        assert migrations.differences(connection, "journal") == []
        assert migrations.differences(connection, "bodies") == []


@both
def test_the_differences_are_seen(postgres_url: str, tmp_path: Path, database: Schema) -> None:
    """So that an empty list means something."""
    prepare(Home(tmp_path, postgres_url))
    table, column = {"journal": ("jobs", "error"), "bodies": ("bodies", "size")}[database]
    for statement, told in (
        (f"ALTER TABLE {table} ADD COLUMN surplus text", "surplus"),
        (f"ALTER TABLE {table} DROP COLUMN {column} CASCADE", column),
        ("CREATE TABLE another (x int)", "another"),
    ):
        with connected(postgres_url) as connection:
            connection.exec_driver_sql(statement)
            assert told in str(migrations.differences(connection, database))


@both
def test_every_index_and_constraint_is_as_the_code_says(postgres: PostgresServer, database: Schema) -> None:
    """Alembic compares no conditions of partial indexes: what the server says of each is compared with a
    database that `create_all` makes."""
    migrated, made = postgres.create_database(), postgres.create_database()
    migrations.upgrade(PostgreSQL(migrated, database))
    with connected(made) as connection:
        migrations.METADATA[database].create_all(connection)
        if database == "journal":
            views.create(connection)
        expected = defined(connection)
    with connected(migrated) as connection:
        assert defined(connection) == expected
    if database == "journal":
        partial = [name for (kind, name), told in expected.items() if kind == "index" and "WHERE" in told]
        assert len(partial) > 10
        assert len([told for told in expected.values() if told.startswith("FOREIGN KEY")]) > 10
        assert [told for told in expected.values() if told.startswith("jsonb")]
    for url in (migrated, made):
        postgres.drop_database(url)


@both
def test_an_upgrade_of_the_newest_schema_changes_nothing(postgres_url: str, database: Schema) -> None:
    found = PostgreSQL(postgres_url, database)
    migrations.upgrade(found)
    with connected(postgres_url) as connection:
        before = defined(connection)
        oids = connection.exec_driver_sql("SELECT oid, xmin FROM pg_class ORDER BY oid").all()
    migrations.upgrade(found)
    with connected(postgres_url) as connection:
        assert defined(connection) == before
        assert connection.exec_driver_sql("SELECT oid, xmin FROM pg_class ORDER BY oid").all() == oids


@both
def test_a_schema_of_a_newer_tink_is_refused_and_left_alone(tmp_path: Path, database: Schema) -> None:
    home = new_home(tmp_path)
    with connected(home.database_url) as connection:
        connection.exec_driver_sql(f"UPDATE {database}_schema_version SET version_num = '9999'")
        connection.commit()
        before = defined(connection)
    with pytest.raises(StartupError, match=r"revision 9999.*written by a newer one; install that"):
        prepare(home)
    with connected(home.database_url) as connection:
        assert revisions.look(connection, database).revision == "9999"
        assert defined(connection) == before


@both
def test_while_another_has_the_lock_it_is_told_of_and_nothing_is_done(
    postgres_url: str, database: Schema, tmp_path: Path
) -> None:
    """Of the bodies it is a worker that has lost the journal: he is put out."""
    home = Home(tmp_path, postgres_url)
    writer = PostgreSQL(postgres_url, database).writer()
    with contextlib.closing(writer):
        if database == "bodies":
            prepare(home)
            return
        with pytest.raises(DatabaseInUse, match=r"is in use: a worker on .* writes the journal"):
            prepare(home)
    with connected(postgres_url) as connection:
        assert defined(connection) == {}
    prepare(home)


# -- a migration of tomorrow ------------------------------------------------------------------------


async def _with_history(folder: Path) -> Home:
    home = new_home(folder)
    async with opened(home) as journal:
        await journal.append(session(1, sdk_version="5"))
        await journal.append(*(session(number) for number in range(2, 20)))
    return home


async def test_a_migration_that_fails_or_leaves_something_else_has_not_been(
    autojump_clock: MockClock,
    tmp_path: Path,
    write_next: Callable[[str], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = await _with_history(tmp_path / "home")
    with connected(home.database_url) as connection:
        before = defined(connection)
    # Of different lengths: Python tells source files apart by their size and second.
    for version, error in (
        ("666", r"damaged.*1 differences.*sessions\['s1'\].*restore a backup"),
        ("55555' || nothing || '", r"cannot be opened.*nothing"),
    ):
        write_next(version)
        with pytest.raises(Exception, match=error):
            prepare(home)
        with connected(home.database_url) as connection:
            assert defined(connection) == before
            assert revisions.look(connection, "journal").revision not in (None, "9000")
            assert store.check(connection) == []
    write_next("5")
    async with opened(home) as journal:
        assert len(journal.ledger.sessions) == 19
    with connected(home.database_url) as connection:
        assert ("column", "added.x") in defined(connection)


# -- from every revision that was ever released -----------------------------------------------------


@pytest.mark.parametrize("revision", test_migrations.BACK)
async def test_a_journal_of_an_older_revision_becomes_what_its_events_say(
    autojump_clock: MockClock, tmp_path: Path, revision: str
) -> None:
    home = new_home(tmp_path)
    who = Subject(tenant="t", session_id="s1", model_id="m", job_id="m:0")
    accepted = JobAccepted(op="create_model", seq_id=0, model_seq_id=0, request="{}")
    sample = Subject(tenant="t", session_id="s1", job_id="x:0")
    async with opened(home) as journal:
        await journal.append(
            session(1, user_metadata={"float": 5.0, "large": 1e30, "é": "\N{GRINNING FACE}"})
        )
        await journal.append((who, accepted), (who, JobDone(tokens_in=5, run_ms=0.1)))
        await journal.append((sample, JobAccepted(op="sample", seq_id=0)))
        await journal.append((sample, JobDone(tokens_in=7, tokens_out=9, run_ms=0.2)))
    with connected(home.database_url) as connection:
        expected = defined(connection)
        head = chain.head(connection)
        for statement in test_migrations.BACK[revision]:
            connection.exec_driver_sql(statement)
        connection.exec_driver_sql(f"UPDATE journal_schema_version SET version_num = '{revision}'")
        connection.commit()
        assert defined(connection) != expected

    prepare(home)
    with connected(home.database_url) as connection:
        assert migrations.differences(connection, "journal") == []
        assert defined(connection) == expected
        assert store.check(connection) == []
        assert list(chain.breaks(connection)) == []
        assert chain.head(connection) == head
        (usage,) = connection.exec_driver_sql("SELECT * FROM v_usage").mappings()
    assert usage["tokens"] == 5 + 7 + 9
    async with opened(home) as journal:
        await journal.append(session(2))
    with connected(home.database_url) as connection:
        assert list(chain.breaks(connection)) == []


# Whether they may read what users have sent.
ROLES = {"auditor": True, '"An analyst"': False}


async def test_who_may_not_read_bodies_may_not_read_those_that_an_upgrade_moves_to_another_table(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    home = new_home(tmp_path)
    with connected(home.database_url) as connection:
        for statement in (
            "DROP TABLE short_bodies",
            "UPDATE journal_schema_version SET version_num = '0002'",
            *(f"DROP ROLE IF EXISTS {role}" for role in ROLES),
            *(f"CREATE ROLE {role}" for role in ROLES),
            *(f"ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO {role}" for role in ("PUBLIC", *ROLES)),
            "GRANT SELECT ON bodies TO auditor",
        ):
            connection.exec_driver_sql(statement)
        connection.commit()
    try:
        prepare(home)
        with connected(home.database_url) as connection:
            for role, may in ROLES.items():
                for table in ("bodies", "short_bodies"):
                    name = role.strip('"')
                    query = f"SELECT has_table_privilege('{name}', '{table}', 'SELECT')"
                    assert connection.exec_driver_sql(query).scalar_one() is may, (role, table)
    finally:
        with connected(home.database_url) as connection:
            for role in ROLES:
                connection.exec_driver_sql(f"DROP OWNED BY {role}")
                connection.exec_driver_sql(f"DROP ROLE {role}")
            connection.commit()
