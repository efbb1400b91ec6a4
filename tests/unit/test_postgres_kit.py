"""The PostgreSQL that tests bring along: real, killed and started again, and gone afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import sqlalchemy

from tests.postgres import Mode, PostgresServer, installation, reachable, running, scratch
from tests.processes import children_of, is_alive


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    with running() as server:
        yield server


def ask(url: str, *statements: str) -> list[object]:
    """Through SQLAlchemy, each in a transaction of its own; the first column that the last one returns."""
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
    found: list[object] = []
    for statement in statements:
        with engine.begin() as connection:
            result = connection.execute(sqlalchemy.text(statement))
            found = list(result.scalars()) if result.returns_rows else []
    return found


def shared_memory() -> set[str]:
    """The numbers of System V's blocks."""
    return {line.split()[1] for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]}


def shared_memory_of(server: PostgresServer) -> str:
    found = (server.folder / "postmaster.pid").read_text().splitlines()[6].split()[1]
    assert found in shared_memory()
    return found


def test_sqlalchemy_speaks_to_it(postgres_url: str) -> None:
    assert ask(postgres_url, "SELECT 1") == [1]
    assert ask(postgres_url, "SHOW server_encoding") == ["UTF8"]


def test_every_database_is_new_and_can_be_dropped_in_use(postgres: PostgresServer) -> None:
    first, second = postgres.create_database(), postgres.create_database()
    ask(first, "CREATE TABLE one (number int)")
    assert ask(second, "SELECT count(*) FROM pg_tables WHERE tablename = 'one'") == [0]
    connection = psycopg.connect(first.replace("+psycopg", ""))
    postgres.drop_database(first)
    with pytest.raises(psycopg.errors.AdminShutdown):
        connection.execute("SELECT 1")
    connection.close()
    postgres.drop_database(second)
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        postgres.execute("SELECT 1", first.rpartition("/")[2])


def test_its_commits_are_durable_unless_asked_otherwise(postgres: PostgresServer) -> None:
    for name in ("fsync", "synchronous_commit", "full_page_writes"):
        assert postgres.execute(f"SHOW {name}") == [("on",)]


def test_options_are_what_it_runs_with() -> None:
    with running(options={"search_path": "it's", "max_connections": "7"}) as server:
        assert server.execute("SHOW max_connections") == [("7",)]
        assert server.execute("SHOW search_path") == [("it's",)]


def test_what_was_committed_survives_kill_9(own_postgres: PostgresServer) -> None:
    url = own_postgres.create_database()
    ask(url, "CREATE TABLE kept (number int)", "INSERT INTO kept VALUES (1), (2)")
    for _ in range(2):
        processes = [own_postgres.pid, *children_of(own_postgres.pid)]
        own_postgres.kill()
        assert not own_postgres.is_running
        assert not any(map(is_alive, processes))
        own_postgres.start()
        assert ask(url, "SELECT number FROM kept ORDER BY number") == [1, 2]
    assert "was not properly shut down" in own_postgres.output()


@pytest.mark.parametrize("mode", ["smart", "fast", "immediate"])
def test_it_restarts_on_the_same_port(own_postgres: PostgresServer, mode: Mode) -> None:
    url, pid = own_postgres.create_database(), own_postgres.pid
    own_postgres.restart(mode)
    assert own_postgres.pid != pid
    assert ask(url, "SELECT 1") == [1]


def test_a_replica_has_every_commit_and_takes_over(own_postgres: PostgresServer) -> None:
    url = own_postgres.create_database()
    ask(url, "CREATE TABLE kept (number int)")
    with own_postgres.replica() as replica:
        ask(url, "INSERT INTO kept VALUES (1)")
        own_postgres.kill()
        there = replica.url(url.rpartition("/")[2])
        with pytest.raises(sqlalchemy.exc.InternalError, match="read-only"):
            ask(there, "INSERT INTO kept VALUES (2)")
        replica.promote()
        assert ask(there, "INSERT INTO kept VALUES (2)", "SELECT number FROM kept ORDER BY number") == [
            1,
            2,
        ]
    # The old one has nobody to wait for any more.
    own_postgres.start()
    assert ask(url, "INSERT INTO kept VALUES (3)", "SELECT number FROM kept ORDER BY number") == [1, 3]


def test_a_commit_waits_for_the_replica(own_postgres: PostgresServer) -> None:
    with own_postgres.replica() as replica:
        url = own_postgres.create_database()
        replica.kill()
        waiting = subprocess.Popen(
            [own_postgres.bin("psql"), "--no-psqlrc", "-c", "CREATE TABLE kept ()"],
            env=own_postgres.environment(url.rpartition("/")[2]),
        )
        while not own_postgres.execute("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"):
            assert waiting.poll() is None
        replica.start()
        assert waiting.wait() == 0


def test_psql_and_pg_dump_know_where_it_is(postgres: PostgresServer, postgres_url: str) -> None:
    environment = postgres.environment(postgres_url.rpartition("/")[2])
    subprocess.run(
        [postgres.bin("psql"), "--no-psqlrc", "-c", "CREATE TABLE dumped ()"],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
    )
    dump = subprocess.run([postgres.bin("pg_dump")], env=environment, check=True, stdout=subprocess.PIPE)
    assert b"CREATE TABLE public.dumped" in dump.stdout


@pytest.mark.parametrize("end", ["running", "killed", "stopped", "hung"])
def test_nothing_is_left_of_it(end: str) -> None:
    with scratch() as folder:
        with running(folder / "data") as server:
            processes = [server.pid, *children_of(server.pid)]
            assert len(processes) > 3
            block = shared_memory_of(server)
            if end == "killed":
                server.kill()
            elif end == "stopped":
                server.stop()
            elif end == "hung":
                server.send_signal(signal.SIGSTOP)
        assert not any(Path(f"/proc/{pid}").exists() for pid in processes)
        assert block not in shared_memory()
        assert sorted(path.name for path in folder.iterdir()) == ["data", "data.log"]
    assert not folder.exists()


def test_nothing_is_left_when_a_test_fails() -> None:
    servers: list[PostgresServer] = []

    def fail() -> None:
        with running() as server, server.replica() as replica:
            servers.extend([server, replica])
            raise LookupError("what the test found")

    with pytest.raises(LookupError):
        fail()
    assert not any(server.is_running or server.folder.exists() for server in servers)


def test_one_that_cannot_start_says_why() -> None:
    with (
        pytest.raises(AssertionError, match="requires a Boolean"),
        running(options={"fsync": "maybe"}),
    ):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has folders that the server's user cannot reach")
def test_an_installation_out_of_the_servers_reach_is_copied(tmp_path: Path) -> None:
    package = installation().parent
    tmp_path.chmod(0o700)
    for part in (package, package.with_name(f"{package.name}.libs")):
        shutil.copytree(part, tmp_path / part.name, copy_function=os.link)
    copy = reachable(tmp_path / package.name / "pginstall")
    assert not copy.is_relative_to(tmp_path)
    assert reachable(copy) == copy
