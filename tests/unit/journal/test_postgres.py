"""What holds of PostgreSQL alone: who may write, what a commit means there, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests import postgres as postgres_kit
from tests.postgres import PostgresServer
from tests.unit.journal import journal_kit
from tests.unit.journal.journal_kit import new_home, opened, session, stops_with, stored_sessions
from tink.cli.main import main
from tink.errors import DatabaseInUse, JournalUnavailable, StartupError, tink_error
from tink.home import Home
from tink.journal.chain import Head
from tink.journal.database import Writer, database
from tink.journal.journal import Journal, prepare
from tink.journal.postgres import PostgreSQL, parse, shown
from tink.limits import DATABASE_BEAT_SECONDS, SHORT_BODY
from tink.settings import Settings

pytestmark = pytest.mark.on_files  # the fixture below says where


@pytest.fixture(autouse=True)
def _on_postgres(postgres: PostgresServer) -> Iterator[None]:
    with journal_kit.on_postgres(postgres):
        yield


@contextmanager
def _writing(found: PostgreSQL) -> Iterator[Writer]:
    writer = found.writer()
    try:
        yield writer
    finally:
        writer.close()


def _journal(home: Home) -> PostgreSQL:
    found = database(home, "journal")
    assert isinstance(found, PostgreSQL)
    return found


# -- whose turn it is -------------------------------------------------------------------------------


async def test_a_second_worker_is_refused_and_told_who_has_it(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    home = new_home(tmp_path)
    async with opened(home) as journal:
        with pytest.raises(DatabaseInUse, match=r"is in use: a worker on 127\.0\.0\.1"):
            async with opened(home):
                pass
        await journal.append(session(1))
    assert stored_sessions(home) == {"s1"}
    assert _journal(home).holder() is None


async def test_who_was_put_out_cannot_commit_any_more(autojump_clock: MockClock, tmp_path: Path) -> None:
    home = new_home(tmp_path)
    with stops_with("the journal could not commit"):
        async with opened(home) as journal:
            await journal.append(session(1))
            holder = _journal(home).holder()
            assert holder is not None
            assert _journal(home).put_out(holder)
            async with opened(home) as next_one:  # it takes the bodies, too
                await next_one.append(session(2))
                await next_one.bodies.put(b"a body" * SHORT_BODY)
                with trio.CancelScope(shield=True):
                    await journal.append(session(3))
    assert stored_sessions(home) == {"s1", "s2"}


async def test_who_was_put_out_changes_no_body(autojump_clock: MockClock, tmp_path: Path) -> None:
    """What its retention meant to delete, the next worker may have been given again."""
    home = new_home(tmp_path)
    with stops_with("the journal could not commit"):
        async with opened(home) as journal:
            digest = await journal.bodies.put(b"a body" * SHORT_BODY)
            journal.bodies.named(digest)
            holder = _journal(home).holder()
            assert holder is not None
            _journal(home).put_out(holder)
            async with opened(home) as next_one:
                await next_one.bodies.put(b"a body" * SHORT_BODY)
                with trio.CancelScope(shield=True), journal.bodies.watched() as watch:
                    await journal.bodies.drop([digest], watch)
    async with opened(home) as journal:
        assert await journal.bodies.get(digest) == b"a body" * SHORT_BODY


async def test_a_worker_that_is_idle_gives_a_sign_of_life_and_notices_that_it_was_put_out(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    home = new_home(tmp_path)
    with stops_with("is lost"):
        async with opened(home):
            before = _journal(home).holder()
            assert before is not None
            await trio.sleep(3 * DATABASE_BEAT_SECONDS)
            after = _journal(home).holder()
            assert after is not None
            assert after.silent < before.silent + 3 * DATABASE_BEAT_SECONDS
            _journal(home).put_out(after)
            await trio.sleep(3 * DATABASE_BEAT_SECONDS)


async def test_what_waits_behind_a_connection_that_is_lost_is_not_committed_on_another(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """SQLAlchemy would connect once more, without the lock, where another worker may have taken it."""
    home = new_home(tmp_path)
    world = journal_kit.InlineWorld()
    refused: list[str] = []
    with stops_with(""):  # by the one or by the other
        async with opened(home, world) as journal:
            holder = _journal(home).holder()
            assert holder is not None
            _journal(home).put_out(holder)

            async def append() -> None:
                try:
                    with trio.CancelScope(shield=True):
                        await journal.append(session(1))
                except JournalUnavailable as error:
                    refused.append(str(error))

            async with trio.open_nursery() as nursery:
                world.block = trio.Event()
                await trio.sleep(1.5 * DATABASE_BEAT_SECONDS)  # the sign of life is on its way
                nursery.start_soon(append)
                await trio.sleep(0.1)
                world.block.set()
                world.block = None
    assert len(refused) == 1
    assert stored_sessions(home) == set()
    assert _journal(home).holder() is None


def test_a_writer_never_gets_another_connection(tmp_path: Path) -> None:
    found = _journal(new_home(tmp_path))
    with _writing(found) as writer:
        holder = found.holder()
        assert holder is not None
        found.put_out(holder)
        for match in ("is lost", "is lost, and its lock with it"):
            with pytest.raises(JournalUnavailable, match=match) as lost:
                writer.beat()
            assert lost.value.may_pass


def test_a_commit_that_the_server_warns_of_is_none(tmp_path: Path) -> None:
    """As when somebody ends its wait for a replica."""
    with _writing(_journal(new_home(tmp_path))) as writer:
        writer.check()
        warn = "DO $$ BEGIN RAISE WARNING 'the transaction might not have been replicated'; END $$"
        writer.connection.exec_driver_sql(warn)
        with pytest.raises(JournalUnavailable, match="warns: the transaction might not have been repl"):
            writer.check()


def test_whether_a_worker_is_alive_that_cannot_be_seen_is_not_guessed(
    tmp_path: Path, postgres: PostgresServer
) -> None:
    home = new_home(tmp_path)
    name = home.database_url.rpartition("/")[2]
    with _writing(_journal(home)):
        postgres.execute("DROP ROLE IF EXISTS stranger")
        postgres.execute("CREATE ROLE stranger LOGIN")
        stranger = PostgreSQL(home.database_url.replace("postgres@", "stranger@"), "journal")
        holder = stranger.holder()
        assert holder is not None
        assert holder.silent is None
    postgres.execute(f"ALTER DATABASE {name} SET track_activities = off")
    with _writing(_journal(home)):
        holder = _journal(home).holder()
        assert holder is not None
        assert holder.silent is None


def test_a_role_that_may_not_put_another_out_is_told_so(tmp_path: Path, postgres: PostgresServer) -> None:
    home = new_home(tmp_path)
    postgres.execute("DROP ROLE IF EXISTS stranger")
    postgres.execute("CREATE ROLE stranger LOGIN")
    stranger = PostgreSQL(home.database_url.replace("postgres@", "stranger@"), "journal")
    with _writing(_journal(home)):
        holder = _journal(home).holder()
        assert holder is not None
        assert not stranger.put_out(holder)
        assert _journal(home).holder() is not None


def test_what_may_be_over_in_a_moment_is_told_from_what_is_not(tmp_path: Path) -> None:
    home = new_home(tmp_path)
    away = PostgreSQL("postgresql://127.0.0.1:1/tink", "journal")
    missing = PostgreSQL(f"{home.database_url}_not", "journal")
    for found, may_pass in ((away, True), (missing, False)):
        with pytest.raises(JournalUnavailable) as unavailable:
            found.writer()
        with pytest.raises(StartupError) as unread:
            found.holder()
        assert (unavailable.value.may_pass, unread.value.may_pass) == (may_pass, may_pass)
    with _writing(_journal(home)), pytest.raises(DatabaseInUse) as used:
        _journal(home).writer()
    assert used.value.may_pass


# -- what a commit means ----------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["DATABASE {name}", "ROLE postgres IN DATABASE {name}"])
def test_a_database_whose_commits_may_be_lost_is_refused(
    tmp_path: Path, postgres: PostgresServer, of: str
) -> None:
    home = new_home(tmp_path)
    name = home.database_url.rpartition("/")[2]
    postgres.execute(f"ALTER {of.format(name=name)} SET synchronous_commit = off")
    with pytest.raises(StartupError, match=r"synchronous_commit is off, so what was committed may be lost"):
        prepare(home)


@pytest.mark.parametrize("setting", ["fsync", "full_page_writes"])
def test_a_server_that_does_not_sync_is_refused(setting: str) -> None:
    with (
        postgres_kit.running(options={setting: "off"}) as server,
        pytest.raises(StartupError, match=f"{setting} is off"),
    ):
        PostgreSQL(server.create_database(), "journal").writer()


def test_a_replica_is_not_written_to(tmp_path: Path) -> None:
    with postgres_kit.running() as server:
        url = server.create_database()
        with (
            server.replica() as replica,
            pytest.raises(JournalUnavailable, match="is a replica, which cannot be written") as refused,
        ):
            PostgreSQL(replica.url(url.rpartition("/")[2]), "journal").writer()
        assert refused.value.may_pass


async def test_a_journal_that_lacks_what_was_acknowledged_is_refused(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    home = new_home(tmp_path)
    async with opened(home) as journal:
        await journal.append(session(1))
        head = journal.head
    world = journal_kit.InlineWorld()
    for acknowledged, fits in ((head, True), (Head(head.seq, bytes(32)), False), (Head(99, b"x"), False)):
        opening = Journal.open(home, world, version="0", settings_digest="0", acknowledged=acknowledged)
        if fits:
            async with opening:
                pass
        else:
            with pytest.raises(StartupError, match=f"lacks event {acknowledged.seq}, which was acknowl"):
                async with opening:
                    pass


async def test_what_no_text_of_postgresql_can_hold_is_replaced_and_stops_nothing(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    home = new_home(tmp_path)
    async with opened(home) as journal:
        await journal.append(session(1, display_name="a\0b", user_metadata={"k\0": ["\\u0000", "\0"]}))
        row = journal.ledger.sessions[("s1",)]
        assert row.display_name == "a\N{REPLACEMENT CHARACTER}b"
        assert row.user_metadata == {"k\N{REPLACEMENT CHARACTER}": ["\\u0000", "\N{REPLACEMENT CHARACTER}"]}
        await journal.append(session(2, user_metadata={"a": [1e22, 5.2e16, 1e-30, -0.5, 2.0]}))
        told = journal.ledger.sessions[("s2",)].user_metadata
        assert told == {"a": [10**22, 5.2e16, 1e-30, -0.5, 2]}
    assert stored_sessions(home) == {"s1", "s2"}
    async with opened(home) as journal:
        assert (
            journal.ledger.sessions[("s2",)].user_metadata
            == told
            == {"a": [10**22, 5.2e16, 1e-30, -0.5, 2]}
        )


def test_a_statement_that_waits_for_a_lock_ends_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, postgres: PostgresServer
) -> None:
    monkeypatch.setattr("tink.journal.postgres.LOCK_SECONDS", 0.2)
    home = new_home(tmp_path)
    other = database(home, "bodies").reader()
    with other.connect() as connection:
        connection.exec_driver_sql("SET TRANSACTION READ WRITE")
        connection.exec_driver_sql("LOCK TABLE events")

        async def append() -> None:
            async with opened(home) as journal:
                await journal.append(session(1))

        with pytest.raises(Exception) as raised:
            trio.run(append, clock=MockClock(autojump_threshold=0))
        error = tink_error(raised.value)
        assert isinstance(error, JournalUnavailable)
        assert "timeout" in str(error)
    other.dispose()


# -- what is said -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://me:s3cret@db.example:5433/tink",
        "postgres://me:s3cret@db.example:5433/tink",
        "postgresql://me@db.example:5433/tink?password=s3cret",
    ],
)
def test_a_database_is_shown_without_its_password(url: str) -> None:
    assert shown(url) == "postgresql://me@db.example:5433/tink"
    assert "s3cret" not in repr(Home(Path("home"), url))
    assert parse(url).drivername == "postgresql+psycopg"


@pytest.mark.parametrize(
    "url",
    [
        *("mysql://a@b/c", "tink", "postgresql+asyncpg://a@b/c", "sqlite:///a.sqlite"),
        *("postgresql://u:p@ss@h/db", "postgresql://u:a@b:c@127.0.0.1", "postgresql://a@b:port/c"),
        *("postgresql://h1:1,h2:2/db", "postgresql://[::1/db"),
    ],
)
def test_what_names_no_postgresql_database_is_one_line(url: str) -> None:
    with pytest.raises(StartupError, match="TINK_DATABASE_URL: it is not like postgresql") as raised:
        parse(url)
    assert url not in str(raised.value)
    assert raised.value.__cause__ is None
    assert [line[:18] for line in Settings.read({"TINK_DATABASE_URL": url}).problems] == [
        "TINK_DATABASE_URL:"
    ]


def test_a_server_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    found = PostgreSQL("postgresql://me:s3cret@127.0.0.1:1/tink", "journal")
    with pytest.raises(JournalUnavailable, match="cannot be opened") as raised:
        found.writer()
    assert "\n" not in str(raised.value)
    assert "s3cret" not in str(raised.value)
    with pytest.raises(StartupError, match="cannot be read"):
        found.exists()


def test_a_home_that_has_its_journal_elsewhere_begins_no_second_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = new_home(tmp_path / "home")
    home.note_database(shown(home.database_url))
    monkeypatch.delenv("TINK_DATABASE_URL", raising=False)
    serve = ["serve", "--home", str(home.root), "--port", "0"]
    assert main(serve) == 2
    assert f"is in {shown(home.database_url)}: set TINK_DATABASE_URL" in capsys.readouterr().err
    home.database.unlink()
    home.journal.touch()
    monkeypatch.setenv("TINK_DATABASE_URL", home.database_url)
    assert main(serve) == 2
    assert "'tink db move' takes it there" in capsys.readouterr().err


def test_a_command_finds_the_database_that_the_worker_has_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = new_home(tmp_path / "home")
    home.note_database(shown(home.database_url))
    monkeypatch.delenv("TINK_DATABASE_URL", raising=False)
    assert main(["db", "check", "--home", str(home.root)]) == 0
    assert "all is well" in capsys.readouterr().out
