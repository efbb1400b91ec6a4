"""The embedded trainer: adopted when it is ours and alive, replaced when it is not, and nobody else's
process is ever touched. A stub in a real process stands for the trainer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trio

from tests.processes import kill, trainers_of
from tink.actors import embedded
from tink.actors.embedded import EmbeddedTrainer
from tink.backends import trainer as client
from tink.errors import StartupError
from tink.home import Home
from tink.settings import Settings
from tink.world import World

# Answers /v1/health as its second argument says: "ready", "broken", "refuse" (401) or "silent"; "exit" ends
# at once, "late" takes its time to say that it runs, and "quiet" never does; "forked" serves in children.
# Ends by SIGTERM, or not at all if it is "deaf".
STUB = """
import http.server, json, os, signal, sys, time
ready, mode = sys.argv[1], sys.argv[2]
if mode == "exit":
    print("no model here", file=sys.stderr)
    sys.exit(3)
if mode == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
while mode == "forked" and os.fork():
    os.wait()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if mode == "silent":
            self.connection.close()
            return
        state = "broken" if mode == "broken" else "ready"
        health = dict(protocol="tink-train/1", incarnation=f"i{os.getpid()}", state=state)
        body = json.dumps(health).encode()
        if mode == "refuse":
            body = b"\\x82\\xa5error\\xacunauthorized\\xa7message\\xa2no"
        self.send_response(401 if mode == "refuse" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *arguments):
        pass
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
if mode in ("late", "quiet"):
    time.sleep(2 if mode == "late" else 1000)
scratch = ready + ".tmp"
with open(scratch, "w") as file:
    json.dump(dict(pid=os.getpid(), port=server.server_address[1], incarnation=f"i{os.getpid()}"), file)
os.rename(scratch, ready)
server.serve_forever()
"""


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path / "home")
    home.make()
    yield home
    for pid in _pids(home):
        kill(pid)
    while _made:
        child = _made.pop()._child
        if child is not None:
            child.wait()


# Kept until the end of the test, for their children are reaped then.
_made: list[EmbeddedTrainer] = []


def _trainer(home: Home, mode: str = "ready", *more: str) -> EmbeddedTrainer:
    """As each worker makes its own."""
    trainer = EmbeddedTrainer(Settings(home=home.root), home, World())
    _made.append(trainer)
    trainer._command = [sys.executable, "-S", "-c", STUB, str(home.trainer), mode, *more]
    return trainer


def _pids(home: Home) -> list[int]:
    return trainers_of(home.root)


async def test_the_first_look_starts_it_and_the_next_ones_find_it(home: Home) -> None:
    trainer = _trainer(home)
    endpoint = await trainer.find()
    assert endpoint == await trainer.find()
    assert endpoint.token
    assert len(_pids(home)) == 1
    await trainer.stop()
    assert _pids(home) == []
    assert not home.trainer.exists()


async def test_the_next_worker_adopts_it(home: Home) -> None:
    first = await _trainer(home).find()
    before = _pids(home)
    second = _trainer(home)
    assert await second.find() == first  # the token too: it is the home's
    assert _pids(home) == before
    await second.stop()
    assert _pids(home) == []


async def test_one_of_another_configuration_is_replaced(home: Home) -> None:
    await _trainer(home).find()
    before = _pids(home)
    await _trainer(home, "ready", "--another").find()
    assert len(_pids(home)) == 1
    assert _pids(home) != before


@pytest.mark.parametrize("adopted", [False, True])
async def test_a_dead_one_is_replaced(home: Home, adopted: bool) -> None:
    trainer = _trainer(home)
    await trainer.find()
    (before,) = _pids(home)
    os.kill(before, 9)
    await trainer._wait_for_death([before])
    if adopted:
        trainer = _trainer(home)
    await trainer.find()
    (after,) = _pids(home)
    assert after != before


async def test_one_that_is_silent_is_given_time_and_then_replaced(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "HEALTH_SECONDS", 0.1)
    first = _trainer(home, "silent")
    await first.find()
    before = _pids(home)
    with trio.move_on_after(0.05 + 0.1 * (embedded.SILENT_LOOKS - 1)):
        await first.find()
    assert _pids(home) == before
    await first.find()
    assert len(_pids(home)) == 1
    assert _pids(home) != before


async def test_one_that_speaks_again_is_kept(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "HEALTH_SECONDS", 0.2)
    trainer = _trainer(home)
    endpoint = await trainer.find()
    (pid,) = _pids(home)
    os.kill(pid, signal.SIGSTOP)
    async with trio.open_nursery() as nursery:
        found = []

        async def find() -> None:
            found.append(await trainer.find())

        nursery.start_soon(find)
        await trio.sleep(0.3)
        assert found == []
        os.kill(pid, signal.SIGCONT)
    assert found == [endpoint]
    assert _pids(home) == [pid]


@pytest.mark.parametrize("how", ["stuck", "at the stop"])
async def test_a_stopped_process_is_killed_at_once(
    home: Home, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """It cannot hear a SIGTERM, so there is nothing to wait for."""
    monkeypatch.setattr(embedded, "HEALTH_SECONDS", 0.1)
    monkeypatch.setattr(client, "HEALTH_SECONDS", 0.1)
    trainer = _trainer(home)
    await trainer.find()
    (pid,) = _pids(home)
    os.kill(pid, signal.SIGSTOP)
    with trio.fail_after(embedded.STOP_SECONDS / 2):
        if how == "stuck":
            await trainer.find()
        else:
            await trainer.stop()
    assert pid not in _pids(home)


async def test_one_that_is_unfit_is_replaced_though_it_answers(home: Home) -> None:
    trainer = _trainer(home)
    await trainer.find()
    (pid,) = _pids(home)
    await trainer.find(f"i{pid + 1}")
    assert _pids(home) == [pid]
    await trainer.find(f"i{pid}")
    assert len(_pids(home)) == 1
    assert _pids(home) != [pid]


async def test_one_that_could_not_load_its_model_is_not_adopted(home: Home) -> None:
    """What was wrong may have been mended since."""
    trainer = _trainer(home, "broken")
    await trainer.find()
    before = _pids(home)
    await trainer.find()
    assert len(_pids(home)) == 1
    assert _pids(home) != before


async def test_one_that_does_not_listen_is_killed(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "STOP_SECONDS", 0.2)
    trainer = _trainer(home, "deaf")
    await trainer.find()
    await trainer.stop()
    assert _pids(home) == []


async def test_one_that_cannot_start_is_a_startup_error_with_its_last_words(home: Home) -> None:
    with pytest.raises(StartupError, match=r"(?s)exit status 3.*trainer\.log.*no model here"):
        await _trainer(home, "exit").find()


async def test_one_that_never_says_that_it_runs_is_ended(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "START_SECONDS", 0.3)
    with pytest.raises(StartupError, match="no answer"):
        await _trainer(home, "quiet").find()
    assert _pids(home) == []


async def test_a_stop_while_it_starts_leaves_nothing_behind(home: Home) -> None:
    trainer = _trainer(home, "quiet")
    with trio.move_on_after(0.3):
        await trainer.find()
    assert len(_pids(home)) == 1
    await trainer.stop()
    assert _pids(home) == []


async def test_one_that_a_killed_worker_was_just_starting_is_adopted(home: Home) -> None:
    with trio.move_on_after(0.3):
        await _trainer(home, "late").find()
    before = _pids(home)
    assert len(before) == 1
    await _trainer(home, "late").find()
    assert _pids(home) == before


async def test_one_that_a_killed_worker_started_in_vain_does_not_stay(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trio.move_on_after(0.3):
        await _trainer(home, "quiet").find()
    (before,) = _pids(home)
    monkeypatch.setattr(embedded, "START_SECONDS", 0.3)
    with pytest.raises(StartupError):
        await _trainer(home, "quiet").find()
    assert before not in _pids(home)


async def _forked(home: Home) -> tuple[EmbeddedTrainer, int, int]:
    """A trainer whose server is forked: its parent's pid, and the server's."""
    trainer = _trainer(home, "forked")
    await trainer.find()
    record = home.trainer_record()
    assert record is not None
    (parent,) = set(_pids(home)) - {record.pid}
    return trainer, parent, record.pid


async def test_one_whose_parent_forks_another_is_not_started_again(home: Home) -> None:
    """The parent has its child's command line; the worker waits for what the next child says."""
    trainer, parent, server = await _forked(home)
    kill(server)
    await trainer._wait_for_death([server])
    await trainer.find()
    pids = _pids(home)
    assert parent in pids
    assert server not in pids
    assert len(pids) == 2
    await trainer.stop()
    assert _pids(home) == []


async def test_one_whose_parent_is_killed_goes_on_until_it_dies_itself(home: Home) -> None:
    trainer, parent, server = await _forked(home)
    kill(parent)
    await trainer._wait_for_death([parent])
    await trainer.find()
    assert _pids(home) == [server]
    kill(server)
    await trainer._wait_for_death([server])
    await trainer.find()
    assert len(set(_pids(home)) - {parent, server}) == 2


async def test_one_that_is_killed_for_its_silence_is_followed_by_the_next_of_its_parent(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "HEALTH_SECONDS", 0.1)
    monkeypatch.setattr(client, "HEALTH_SECONDS", 0.1)
    trainer, parent, child = await _forked(home)
    os.kill(child, signal.SIGSTOP)
    await trainer.find()
    assert parent in _pids(home)
    assert child not in _pids(home)
    assert len(_pids(home)) == 2


async def test_one_whose_parent_is_stopped_too_does_not_wait_for_it(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "HEALTH_SECONDS", 0.1)
    monkeypatch.setattr(client, "HEALTH_SECONDS", 0.1)
    trainer, parent, child = await _forked(home)
    for pid in (parent, child):
        os.kill(pid, signal.SIGSTOP)
    with trio.fail_after(embedded.STOP_SECONDS):
        await trainer.find()
    assert not {parent, child} & set(_pids(home))
    assert len(_pids(home)) == 2


async def test_the_first_trainer_alone_is_told_where_to_crash(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINK_CRASH_AT", "trainer.kept")
    monkeypatch.setenv("TINK_API_KEYS", "tml-secret=alice")
    trainer = EmbeddedTrainer(Settings(home=home.root, crash_at="trainer.kept"), home, World())
    first, second = trainer._environment(), trainer._environment()
    assert first["TINK_CRASH_AT"] == "trainer.kept"
    assert "TINK_CRASH_AT" not in second
    assert "TINK_API_KEYS" not in first
    # A point of the worker is its own affair.
    of_the_worker = EmbeddedTrainer(Settings(home=home.root, crash_at="worker.body"), home, World())
    assert "TINK_CRASH_AT" not in of_the_worker._environment()


async def test_the_trainer_of_a_worker_that_torchrun_started_is_alone(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500", "OTHER": "x"}.items():
        monkeypatch.setenv(name, value)
    environment = EmbeddedTrainer(Settings(home=home.root), home, World())._environment()
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & environment.keys()
    assert environment["OTHER"] == "x"


@pytest.mark.parametrize("record", [b"", b"{", b"[]", b'{"pid": "x"}'])
async def test_a_record_that_cannot_be_read_is_none(home: Home, record: bytes) -> None:
    home.trainer.write_bytes(record)
    await _trainer(home).find()
    assert len(_pids(home)) == 1


def _record(home: Home, pid: int, port: int) -> None:
    home.trainer.write_bytes(msgspec.json.encode({"pid": pid, "port": port, "incarnation": "i1"}))


@pytest.mark.parametrize(
    "arguments", [["tink.trainer"], ["tink.trainer", "--ready-file", "/another/trainer.json"]]
)
@pytest.mark.parametrize("same", [True, False], ids=["our configuration", "another"])
async def test_a_process_that_only_has_its_pid_is_never_touched(
    home: Home, arguments: list[str], same: bool
) -> None:
    """After a reboot a pid is anyone's: even that of another home's trainer."""
    with subprocess.Popen(  # noqa: ASYNC220  it returns at once
        [sys.executable, "-S", "-c", "import sys; sys.stdin.read()", *arguments], stdin=subprocess.PIPE
    ) as other:
        trainer = _trainer(home)
        if same:
            home.trainer_command.write_text("\n".join(trainer._command))
        _record(home, other.pid, 1)
        await trainer.find()
        assert other.poll() is None
        assert len(_pids(home)) == 1
        _record(home, other.pid, 1)
        await trainer.stop()
        assert other.poll() is None
        assert _pids(home) == []
        other.communicate()


async def test_another_ones_server_on_its_port_is_not_adopted(home: Home, tmp_path: Path) -> None:
    other_home = Home(tmp_path / "other")
    other_home.make()
    other = _trainer(other_home, "refuse")
    endpoint = await other._start()
    try:
        trainer = _trainer(home)
        home.trainer_command.write_text("\n".join(trainer._command))
        _record(home, 2**22 + 1, int(endpoint.url.rpartition(":")[2]))
        assert (await trainer.find()).url != endpoint.url
        assert len(_pids(other_home)) == 1
    finally:
        await other.stop()


async def test_its_session_is_its_own_and_it_does_not_hold_the_lock(home: Home) -> None:
    """Ctrl-C in the worker's terminal is not for it; nor does it keep the next worker out."""
    with home.lock():
        await _trainer(home).find()
    (pid,) = _pids(home)
    assert os.getsid(pid) != os.getsid(0)
    with home.lock():
        pass
