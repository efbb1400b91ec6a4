"""The database is away, frozen, full, or another one: nothing is acknowledged meanwhile, the worker goes on
by itself, and the run is what it would have been. A client sees that it takes longer."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests import postgres
from tests.crash.runs import Numbers, Run
from tests.crash.short import await_half, begun, ended, wait
from tests.live import LiveServer
from tests.postgres import PostgresServer
from tests.processes import SYS_ADMIN, children_of, may
from tink.home import Home
from tink.journal import chain, store
from tink.journal.reader import open_journal

pytestmark = [
    pytest.mark.slow,
    # The SDK leaves sockets to the garbage collector when its server dies under it.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

AWAY_SECONDS = 2.0


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    with postgres.running() as server:
        yield server


@contextmanager
def _serving(home: Path, url: str) -> Iterator[LiveServer]:
    worker = LiveServer(home, TINK_DATABASE_URL=url)
    try:
        worker.start()
        yield worker
    finally:
        worker.close()


def _ends_well(run: Run, worker: LiveServer, undisturbed: Numbers, process: int, url: str) -> None:
    """In the worker that it began in; and what is in the journal is whole."""
    assert ended(run).numbers == undisturbed
    assert worker.process is not None
    assert worker.process.pid == process
    assert worker.process.poll() is None
    with open_journal(Home(worker.home, url)) as journal:
        assert store.check(journal) == []
        assert list(chain.breaks(journal)) == []
        for kind in ("diverged", "job_failed"):
            count = f"SELECT count(*) FROM events WHERE kind = '{kind}'"
            assert journal.exec_driver_sql(count).scalar() == 0


def _pid(worker: LiveServer) -> int:
    assert worker.process is not None
    return worker.process.pid


@pytest.mark.parametrize("how", ["fast", "kill"])
def test_a_server_that_is_away_is_waited_for(
    tmp_path: Path, server: PostgresServer, undisturbed: Numbers, how: str
) -> None:
    url = server.create_database()
    with _serving(tmp_path / "home", url) as worker:
        process, run = _pid(worker), begun(worker.url)
        await_half(run)
        if how == "kill":
            server.kill()
        else:
            server.stop(how)  # type: ignore[arg-type]
        worker.wait_for_output("nothing is taken until it is back", "waiting for the database")
        # Nobody is told that anything is taken.
        with pytest.raises(httpx.TransportError):
            httpx.post(f"{worker.url}/api/v1/create_session", json={}, timeout=1)
        results = len(run.results)
        time.sleep(AWAY_SECONDS)
        assert len(run.results) == results
        server.start()
        _ends_well(run, worker, undisturbed, process, url)


def test_a_server_that_is_frozen_is_waited_for(
    tmp_path: Path, server: PostgresServer, undisturbed: Numbers
) -> None:
    url = server.create_database()
    with _serving(tmp_path / "home", url) as worker:
        process, run = _pid(worker), begun(worker.url)
        await_half(run)
        assert server.process is not None
        frozen = [server.process.pid, *children_of(server.process.pid)]
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(AWAY_SECONDS)
        finally:
            for pid in frozen:
                os.kill(pid, signal.SIGCONT)
        _ends_well(run, worker, undisturbed, process, url)
        assert "nothing is taken until it is back" not in worker.output()


@pytest.mark.skipif(not may(SYS_ADMIN), reason="to mount a small disk takes root")
def test_a_server_whose_disk_is_full_is_waited_for(tmp_path: Path, undisturbed: Numbers) -> None:
    with postgres.scratch() as scratch:
        disk = scratch / "disk"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", str(disk)], check=True)
        try:
            disk.chmod(0o711)
            options = {"min_wal_size": "32MB", "max_wal_size": "48MB"}
            with postgres.running(disk / "data", options=options) as server:
                url = server.create_database()
                with _serving(tmp_path / "home", url) as worker:
                    process, run = _pid(worker), begun(worker.url)
                    await_half(run)
                    ballast = disk / "ballast"
                    _fill(disk, ballast)
                    # A server without room for its log stops; whoever runs it starts it again.
                    wait(
                        lambda: "nothing is taken until it is back" in worker.output() or run.ended,
                        "the disk is full",
                    )
                    assert not run.ended
                    ballast.unlink()
                    if not server.is_running:
                        server.start()
                    _ends_well(run, worker, undisturbed, process, url)
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)


def _fill(disk: Path, ballast: Path) -> None:
    """All the room that is left, and what is given back."""
    with ballast.open("wb", buffering=0) as file:
        while shutil.disk_usage(disk).free:
            try:
                file.write(bytes(min(1 << 20, shutil.disk_usage(disk).free)))
            except OSError:
                return


def test_a_replica_takes_over_from_its_primary(
    tmp_path: Path, server: PostgresServer, undisturbed: Numbers
) -> None:
    """With synchronous replication all that was acknowledged is there."""
    name = server.create_database().rpartition("/")[2]
    with server.replica() as replica:
        url = (
            f"postgresql+psycopg://postgres@/{name}?host=127.0.0.1:{server.port}"
            f"&host=127.0.0.1:{replica.port}&target_session_attrs=read-write"
        )
        with _serving(tmp_path / "home", url) as worker:
            process, run = _pid(worker), begun(worker.url)
            await_half(run)
            server.kill()
            worker.wait_for_output("waiting for the database")
            replica.promote()
            _ends_well(run, worker, undisturbed, process, url)


def test_a_database_that_lost_what_was_acknowledged_is_refused(
    tmp_path: Path, server: PostgresServer
) -> None:
    """An older copy took its place, as a replica does that was behind."""
    url, older = server.create_database(), server.folder.with_name("older")
    with _serving(tmp_path / "home", url) as worker:
        server.stop()
        subprocess.run(["cp", "--archive", server.folder, older], check=True)
        server.start()
        worker.wait_until_ready()
        run = begun(worker.url)
        await_half(run)
        server.kill()
        shutil.rmtree(server.folder)
        older.rename(server.folder)
        server.start()
        assert worker.wait_for_exit() == 2
        assert "which was acknowledged" in worker.output()
        assert "docs/operations.md" in worker.output()
        run.enough.set()
