"""A second worker on the same database takes over from one that dies, hangs or is cut off, and puts it out:
the run goes on, bit for bit, and whoever wakes up late can neither commit nor train."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests import postgres
from tests.crash.balancer import Balancer
from tests.crash.runs import Numbers
from tests.crash.short import await_half, begun, ended
from tests.live import LiveServer, LiveTrainer
from tests.postgres import PostgresServer
from tests.processes import NET_ADMIN, SYS_ADMIN, may
from tink.home import Home
from tink.journal import chain, store
from tink.journal.reader import open_journal

pytestmark = [
    pytest.mark.slow,
    # The SDK leaves sockets to the garbage collector when its server dies under it.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

# With less patience than usual.
LIMITS = {"DATABASE_BEAT_SECONDS": 0.2, "DATABASE_SILENT_SECONDS": 2.0, "DATABASE_LOST_SECONDS": 4}


class Worker(LiveServer):
    """On a home of its own, with the artifacts and the database of the others."""

    def __init__(self, root: Path, name: str, url: str, **environment: str) -> None:
        super().__init__(
            root / name,
            program="tests.crash.faulty",
            FAULTY_LIMITS=json.dumps(LIMITS),
            TINK_DATABASE_URL=url,
            TINK_ARTIFACTS=str(root / "artifacts"),
            **environment,
        )

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres.running() as server:
        yield server


@contextmanager
def _pair(root: Path, url: str, **environment: str) -> Iterator[tuple[Worker, Worker, Balancer]]:
    """One that serves, one that waits for its turn, and what is before both."""
    one, two = (Worker(root, name, url, **environment) for name in ("one", "two"))
    with ExitStack() as stack:
        stack.callback(one.close)
        stack.callback(two.close)
        one.start()
        two.start(wait=False)
        two.wait_for_output("waiting for the database", "takes its place when it ends")
        balancer = stack.enter_context(Balancer([one.url]))
        yield one, two, balancer


def _take_over(two: Worker, balancer: Balancer) -> float:
    """Seconds until the second one serves."""
    began = time.monotonic()
    two.wait_until_listening()
    balancer.urls = [*balancer.urls, two.url]
    return time.monotonic() - began


def _check_journal(root: Path, url: str) -> None:
    """It is whole; and what a worker wrote comes before all that the next one wrote."""
    with open_journal(Home(root, url)) as journal:
        assert store.check(journal) == []
        assert list(chain.breaks(journal)) == []
        lives = [record.incarnation for record in store.read_events(journal)]
        assert lives == sorted(lives)
        assert set(lives) >= {1, 2}
        assert journal.exec_driver_sql("SELECT count(*) FROM events WHERE kind = 'diverged'").scalar() == 0


def test_a_standby_takes_over_from_a_worker_that_is_killed(
    tmp_path: Path, server: PostgresServer, undisturbed: Numbers
) -> None:
    url = server.create_database()
    with _pair(tmp_path, url) as (one, two, balancer):
        run = begun(balancer.url)
        await_half(run)
        one.kill()
        seconds = _take_over(two, balancer)
        assert ended(run).numbers == undisturbed
        print(f"killed: the stand-by serves after {seconds:.1f} s")
        _check_journal(tmp_path, url)


def test_a_standby_takes_over_from_a_worker_that_stops_by_itself_and_back(
    tmp_path: Path, server: PostgresServer
) -> None:
    url = server.create_database()
    with _pair(tmp_path, url) as (one, two, balancer):
        assert one.terminate() == 0
        _take_over(two, balancer)
        one.start(wait=False)
        one.wait_for_output("waiting for the database")
        assert two.terminate() == 0
        one.wait_until_listening()
        assert one.terminate() == 0
        _check_journal(tmp_path, url)


def test_a_worker_that_waits_can_be_told_to_stop(tmp_path: Path, server: PostgresServer) -> None:
    with _pair(tmp_path, server.create_database()) as (_one, two, _balancer):
        assert two.terminate() == 0
        assert not (two.home / "worker.json").exists()


def test_a_worker_that_was_stopped_wakes_up_and_can_do_nothing(
    tmp_path: Path, server: PostgresServer, undisturbed: Numbers
) -> None:
    """On one training server: what the first one still sends there is refused."""
    url = server.create_database()
    trainer = LiveTrainer(
        tmp_path / "trainer", "--artifacts", tmp_path / "artifacts", TINK_TRAINER_TOKEN="of this test"
    )
    settings = {
        "USE_MEGATRON": "true",
        "MEGATRON_SERVER_URL": trainer.url,
        "TINK_TRAINER_TOKEN": "of this test",
    }
    try:
        trainer.start()
        trainer.wait_until_ready()
        with _pair(tmp_path, url, **settings) as (one, two, balancer):
            run = begun(balancer.url)
            await_half(run)
            one.send(signal.SIGSTOP)
            seconds = _take_over(two, balancer)
            two.wait_for_output("put out a worker that was silent")
            two.wait_until_ready()
            one.send(signal.SIGCONT)
            one.wait_for_output("the journal's database is lost", "waiting for the database")
            assert ended(run).numbers == undisturbed
            print(f"stopped: the stand-by serves after {seconds:.1f} s")
            assert one.process is not None
            assert one.process.poll() is None
            # And it is the stand-by now.
            two.kill()
            one.wait_until_ready()
            _check_journal(tmp_path, url)
    finally:
        trainer.kill()


NETWORK = "10.213.17"


@contextmanager
def _namespace() -> Iterator[str]:
    """A network of its own, with one cable to this one; it takes root."""
    name = f"tink{os.getpid()}"
    here, there = f"{name}a"[:15], f"{name}b"[:15]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    ip("netns", "add", name)
    try:
        ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", name)
        ip("addr", "add", f"{NETWORK}.1/24", "dev", here)
        ip("link", "set", here, "up")
        ip("-n", name, "addr", "add", f"{NETWORK}.2/24", "dev", there)
        ip("-n", name, "link", "set", there, "up")
        ip("-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        ip("netns", "del", name)


class Elsewhere(Worker):
    """A worker in a network namespace, reached and reaching by its cable."""

    def __init__(self, namespace: str, root: Path, name: str, url: str, **environment: str) -> None:
        super().__init__(root, name, url, **environment)
        self.namespace = namespace

    @property
    def url(self) -> str:
        return f"http://{NETWORK}.2:{self.port}"

    @property
    def command(self) -> list[str]:
        return [
            "ip",
            "netns",
            "exec",
            self.namespace,
            *super().command,
            "--host",
            f"{NETWORK}.2",
            "--no-auth",
        ]

    def unplug(self, *, up: bool = False) -> None:
        link = f"{self.namespace}a"[:15]
        subprocess.run(["ip", "link", "set", link, "up" if up else "down"], check=True)


@pytest.mark.skipif(
    not may(NET_ADMIN, SYS_ADMIN) or shutil.which("ip") is None,
    reason="a network namespace takes root, and iproute2",
)
def test_a_worker_whose_network_is_cut_gives_way_and_waits_when_it_is_back(
    tmp_path: Path, undisturbed: Numbers
) -> None:
    with ExitStack() as stack:
        name = stack.enter_context(_namespace())
        server = stack.enter_context(postgres.running(options={"listen_addresses": "*"}))
        with (server.folder / "pg_hba.conf").open("a") as rules:
            rules.write(f"host all all {NETWORK}.0/24 trust\n")
        server.restart()
        url = server.create_database()
        one = Elsewhere(name, tmp_path, "one", url.replace("127.0.0.1", f"{NETWORK}.1"))
        two = Worker(tmp_path, "two", url)
        stack.callback(two.close)
        stack.callback(one.close)
        one.start()
        two.start(wait=False)
        two.wait_for_output("takes its place when it ends")
        balancer = stack.enter_context(Balancer([one.url]))
        run = begun(balancer.url)
        await_half(run)
        one.unplug()
        seconds = _take_over(two, balancer)
        assert ended(run).numbers == undisturbed
        print(f"cut off: the stand-by serves after {seconds:.1f} s")
        one.wait_for_output("the journal's database is lost")
        one.unplug(up=True)
        one.wait_for_output("takes its place when it ends")
        _check_journal(tmp_path, url)
