"""Stuck, not dead: real processes that are stopped, hang, answer wrongly or cannot write, under the real
SDK. One test for each outcome in docs/recovery.md, "Stuck, not dead". A run that was disturbed gives the
numbers of one that was not.

One server, with little patience (LIMITS), serves all tests: what it does wrong it is told by each of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import resource
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import msgspec
import pytest
import tinker
from tinker import types

from tests.crash.faulty import Fault, calls_file, faults_file
from tests.live import LiveServer
from tink.limits import PAUSE_SECONDS, SHORT_BODY

pytestmark = [
    pytest.mark.slow,
    # The SDK leaves sockets to the garbage collector when its server dies under it.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

LIMITS = {
    "BEAT_SECONDS": 0.2,
    "HEALTH_SECONDS": 1.0,
    "SILENT_LOOKS": 4,
    "HOLD_SECONDS": 1.0,
    "GRACE_SECONDS": 0.5,
    "MAX_ANSWER": 1024 * 1024,
    "LONGEST_PAUSE_SECONDS": 0.4,
    "WRONG_ANSWERS": 5,
    "LOCK_SECONDS": 2.0,
    "SLOW_COMMIT_SECONDS": 0.4,
}
# From the first unanswered look to the last.
SILENCE = LIMITS["HEALTH_SECONDS"] * (LIMITS["SILENT_LOOKS"] + 1)
HANG_SECONDS = 2.0
STEPS, DISTURBED = 4, 2
MODEL = "tink/qwen3-tiny"
NO_SPACE = r"(disk I/O error|database or disk is full)"
CAP_DAC_OVERRIDE, PR_CAPBSET_DROP = 1, 24


def _as_anyone() -> None:
    """Root writes to what is read-only: this process, and its children, shall not."""
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


class Server(LiveServer):
    """And what there is to see of it."""

    def __init__(self, home: Path) -> None:
        super().__init__(
            home,
            program="tests.crash.faulty",
            limit=_as_anyone,
            FAULTY_LIMITS=json.dumps(LIMITS),
            TINK_HANG_SECONDS=str(HANG_SECONDS),
            TINK_SNAPSHOT_SECONDS="1000",
        )
        self._copy: subprocess.Popen[bytes] | None = None

    def _open_log(self) -> IO[bytes]:
        """Through a pipe: where this process cannot write it still can tell."""
        self._end_copy()
        with super()._open_log() as log:
            self._copy = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
        assert self._copy.stdin is not None
        return self._copy.stdin

    def _end_copy(self) -> None:
        """It ends with the process that it copies from."""
        if self._copy is not None:
            self._copy.wait(timeout=10)

    def wait_for_exit(self, seconds: float = 60.0) -> int:
        status = super().wait_for_exit(seconds)
        self._end_copy()
        return status

    def close(self) -> None:
        super().close()
        self._end_copy()

    def fault(self, *faults: Fault) -> None:
        """From now on, and no others."""
        scratch = self.home.with_name("faults.new")
        scratch.write_bytes(msgspec.json.encode(faults))
        scratch.replace(faults_file(self.home))
        calls_file(self.home).unlink(missing_ok=True)

    def calls(self, path: str, fault: str) -> list[float]:
        """When there were such calls since the last `fault()`."""
        lines = [line.split() for line in calls_file(self.home).read_text().splitlines()]
        return [float(at) for at, called, did in lines if called.startswith(path) and did == fault]

    def restart(self) -> None:
        """As a service manager would do it."""
        assert self.process is not None
        assert self.process.poll() is not None
        self.start(wait=False)
        self.wait_until_ready()

    def rows(self, query: str) -> list[Any]:
        with contextlib.closing(
            sqlite3.connect(f"file:{self.home}/journal.sqlite?mode=ro", uri=True)
        ) as journal:
            return journal.execute(query).fetchall()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("stuck") / "home")
    server.start()
    yield server
    server.close()


@pytest.fixture(scope="module")
def service(shared: Server) -> tinker.ServiceClient:
    return tinker.ServiceClient(base_url=shared.url, api_key="tml-local")


class Log:
    """What the server has logged since the test began."""

    def __init__(self, server: Server) -> None:
        self._server, self._from = server, len(server.output())

    @property
    def text(self) -> str:
        return self._server.output()[self._from :]

    def wait_for(self, words: str) -> None:
        self._server._wait(lambda: words in self.text, f"did not print {words!r}")

    def count(self, words: str) -> int:
        return sum(words in line for line in self.text.splitlines())


@pytest.fixture
def server(shared: Server) -> Iterator[Server]:
    """In good order before the test. After it: one end to each job, none failed, and nothing diverged."""
    assert shared.process is not None
    if shared.process.poll() is not None:  # a test that failed has left it so
        shared.restart()
    shared.fault()
    yield shared
    assert shared.rows("SELECT job_id FROM events WHERE kind = 'diverged'") == []
    ends = "SELECT job_id FROM events WHERE kind IN ('job_done', 'job_failed')"
    assert shared.rows(f"{ends} GROUP BY job_id HAVING count(*) > 1") == []
    assert shared.rows("SELECT job_id FROM jobs WHERE state IN ('accepted', 'running')") == []
    assert "Traceback" not in shared.output()


@pytest.fixture
def log(server: Server) -> Log:
    return Log(server)


def train(
    service: tinker.ServiceClient, disturb: Callable[[], None] = lambda: None, *, idle: bool = False
) -> list[float]:
    """A run's numbers. `disturb()` is called in the middle, while some of it is on its way; `idle`: while
    nothing is."""
    client = service.create_lora_training_client(base_model=MODEL, rank=4, seed=11).result()
    numbers: list[float] = []
    for step in range(STEPS):
        update = client.forward_backward([_datum(step)], "cross_entropy")
        optim = client.optim_step(types.AdamParams(learning_rate=1e-2))
        if step == DISTURBED and not idle:
            disturb()
        result = update.result(timeout=60)
        numbers += [result.metrics["loss:sum"], *result.loss_fn_outputs[0]["logprobs"].data]
        numbers.append(optim.result(timeout=60).metrics["grad_norm"])
        if step == DISTURBED and idle:
            disturb()
    return numbers


# So many data are no short body.
LONG = SHORT_BODY // 40


def _datum(step: int) -> types.Datum:
    tokens = [(7 * step + 3 * index) % 300 for index in range(40)]
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * 39},
    )


@pytest.fixture(scope="module")
def expected(service: tinker.ServiceClient) -> list[float]:
    """The numbers of an undisturbed run."""
    return train(service)


def attempts(server: Server) -> int:
    """The most of a job of the newest model."""
    newest = "(SELECT model_id FROM models ORDER BY created_at DESC LIMIT 1)"
    return int(server.rows(f"SELECT max(attempts) FROM jobs WHERE model_id = {newest}")[0][0])


# -- processes that are stopped ---------------------------------------------------------------------


def test_a_trainer_that_stays_stopped_is_replaced_within_its_time(
    server: Server, service: tinker.ServiceClient, expected: list[float], log: Log
) -> None:
    before = server.trainer_pid()
    assert train(service, lambda: os.kill(before, signal.SIGSTOP)) == expected
    assert server.trainer_pid() != before
    assert not _runs(before)
    assert log.count("trainer is stuck") == 1
    (line,) = re.findall(r"event=\"trainer is stuck\".* silent_seconds=(\d+)", log.text)
    assert int(line) <= SILENCE
    assert attempts(server) == 2


def test_a_trainer_that_goes_on_in_time_is_kept_and_nothing_is_redone(
    server: Server, service: tinker.ServiceClient, expected: list[float], log: Log
) -> None:
    before = server.trainer_pid()

    def pause() -> None:
        os.kill(before, signal.SIGSTOP)
        time.sleep(SILENCE / 2)
        os.kill(before, signal.SIGCONT)

    assert train(service, pause) == expected
    assert server.trainer_pid() == before
    assert attempts(server) == 1
    assert log.count("event=redo") == 0


def test_a_worker_that_is_stopped_for_a_while_is_only_late(
    server: Server, service: tinker.ServiceClient, expected: list[float], log: Log
) -> None:
    """Longer than its trainer's patience, and its own: what it missed meanwhile is nobody's fault."""
    before = server.trainer_pid()

    def pause() -> None:
        server.stop()
        time.sleep(SILENCE + 1.0)
        server.resume()

    assert train(service, pause) == expected
    assert server.trainer_pid() == before
    assert attempts(server) == 1
    assert log.count("event=redo") == 0


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# -- a trainer that answers wrongly -----------------------------------------------------------------


@pytest.mark.parametrize(
    "what",
    [
        "garbage",
        "half",
        "error_500",
        "error_502",
        "late",
        "other_op",
        "other_model",
        "flood",
        "endless",
        "cut",
    ],
)
def test_a_wrong_answer_is_asked_for_again_and_changes_nothing(
    server: Server, service: tinker.ServiceClient, expected: list[float], log: Log, what: str
) -> None:
    # One of them may meet an operation ahead.
    times, before = 3 if what in ("late", "endless") else 5, server.trainer_pid()
    assert train(service, lambda: server.fault(Fault("/v1/ops", what, times))) == expected
    assert server.trainer_pid() == before
    assert attempts(server) == 1
    assert log.count("training call") == times
    asked = server.calls("/v1/ops", what)
    assert len(asked) == times
    # Not as fast as it answers: after each but the one ahead there is a pause.
    assert sum(later - earlier > PAUSE_SECONDS for earlier, later in pairwise(asked)) == times - 2


@pytest.mark.parametrize("what", ["garbage", "error_500", "other_sample", "flood"])
def test_a_wrong_answer_to_a_sample_is_asked_for_again(
    server: Server, service: tinker.ServiceClient, log: Log, what: str
) -> None:
    sampler = service.create_sampling_client(base_model=MODEL).result()

    def sample() -> Any:
        asked = sampler.sample(
            types.ModelInput.from_ints([5, 6, 7]), 1, types.SamplingParams(max_tokens=5, seed=3)
        )
        return asked.result(timeout=60).sequences[0].tokens

    right = sample()
    server.fault(Fault("/v1/samples", what, 2))
    assert sample() == right
    assert log.count("sampling call") == 2


@pytest.mark.parametrize("path", ["/v1/health", "/v1/state", "/v1/info"])
def test_a_wrong_answer_of_health_and_state_is_only_delay(
    server: Server, service: tinker.ServiceClient, expected: list[float], log: Log, path: str
) -> None:
    before = server.trainer_pid()
    # The garbage makes the link look again.
    faults = Fault("/v1/ops", "garbage"), Fault(path, "garbage", 3)
    assert train(service, lambda: server.fault(*faults)) == expected
    assert server.trainer_pid() == before
    assert log.count("trainer lost") <= 1


def test_a_trainer_that_answers_wrongly_for_ever_is_replaced(
    server: Server, service: tinker.ServiceClient, expected: list[float], log: Log
) -> None:
    before = server.trainer_pid()
    fault = Fault("/v1/ops", "garbage", 10_000, pid=before)
    assert train(service, lambda: server.fault(fault)) == expected
    assert server.trainer_pid() != before
    # One was to an operation ahead, and the first one in its turn had applied the operation: from there on
    # they count.
    asked = server.calls("/v1/ops", "garbage")
    assert len(asked) <= LIMITS["WRONG_ANSWERS"] + 2
    # Each pause is longer than the one before.
    assert asked[-1] - asked[-2] > 2 * PAUSE_SECONDS
    assert log.count("trainer is replaced") == 1
    assert attempts(server) == 2


def test_an_operation_that_hangs_while_health_answers_is_ended_and_redone(
    server: Server, service: tinker.ServiceClient, expected: list[float], log: Log
) -> None:
    before = server.trainer_pid()
    assert (
        train(service, lambda: server.fault(Fault("forward_backward", "hang", 1, pid=before))) == expected
    )
    if server.trainer_pid() == before:  # the operation was quicker than the fault: the next one hangs
        assert train(service) == expected
    assert server.trainer_pid() != before
    assert log.count("trainer is replaced") == 1
    assert "has made no progress" in log.text


# -- a disk that is full ----------------------------------------------------------------------------


@contextlib.contextmanager
def limited(pid: int, size: int) -> Iterator[None]:
    """The process cannot write a file beyond `size`: a disk that has become full."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))


@pytest.mark.parametrize("what", ["the journal", "the body store"])
def test_a_full_disk_stops_the_worker_and_the_next_one_goes_on(
    server: Server, service: tinker.ServiceClient, expected: list[float], log: Log, what: str
) -> None:
    client = service.create_lora_training_client(base_model=MODEL, rank=4, seed=11).result()
    more: list[Any] = []

    def fill() -> None:
        with limited(server.pid, 4096):
            # A command is in its event, long data are in the body store.
            if what == "the journal":
                more.append(client.optim_step(types.AdamParams(learning_rate=1e-2)))
            else:
                more.append(client.forward_backward([_datum(0)] * LONG, "cross_entropy"))
            assert server.wait_for_exit() == 3
        server.restart()

    # Else what is on its way may meet the other database first.
    assert train(service, fill, idle=True) == expected
    assert more[0].result(timeout=60)
    (line,) = [line for line in log.text.splitlines() if line.startswith("tink serve:")]
    assert re.match(rf"tink serve: {what} could not commit: {NO_SPACE}", line)


def test_a_full_artifact_folder_fails_the_save_and_nothing_else(
    server: Server, service: tinker.ServiceClient, expected: list[float]
) -> None:
    client = service.create_lora_training_client(base_model=MODEL, rank=4, seed=11).result()
    with limited(server.trainer_pid(), 4096):
        with pytest.raises(tinker.RequestFailedError, match="File too large"):
            client.save_state("one").result(timeout=60)
        with pytest.raises(tinker.RequestFailedError, match="File too large"):
            client.save_weights_for_sampler("two").result(timeout=60)
    assert client.save_state("one").result(timeout=60).path.endswith("/one")
    assert train(service) == expected


# -- files that cannot be used ----------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.5, 2.0])
def test_a_lock_of_another_process_is_waited_for_and_then_stops_the_worker(
    server: Server, service: tinker.ServiceClient, expected: list[float], log: Log, seconds: float
) -> None:
    patient = seconds < LIMITS["LOCK_SECONDS"]

    def lock() -> None:
        other = sqlite3.connect(server.home / "journal.sqlite", isolation_level=None)
        with contextlib.closing(other):
            other.execute("BEGIN IMMEDIATE")
            if patient:
                time.sleep(seconds)
            else:
                assert server.wait_for_exit() == 3
        if not patient:
            server.restart()

    assert train(service, lock) == expected
    assert log.count("could not commit, another process has held a lock for 2 s") == (not patient)
    if not patient:
        assert log.count("a commit takes long") == 1


def test_a_database_that_is_moved_away_stops_the_worker_and_goes_on_when_it_is_back(
    server: Server, service: tinker.ServiceClient, expected: list[float], log: Log
) -> None:
    files = [server.home / f"journal.sqlite{end}" for end in ("", "-wal", "-shm")]
    away = server.home.with_name("away")

    def move() -> None:
        away.mkdir(exist_ok=True)
        for file in files:
            file.rename(away / file.name)
        assert server.wait_for_exit() == 3
        for file in files:
            file.unlink(missing_ok=True)
        for file in away.iterdir():
            file.rename(server.home / file.name)
        server.restart()

    assert train(service, move) == expected
    assert log.count("was deleted or replaced while the worker ran") == 1


@pytest.mark.parametrize("name", ["journal.sqlite", "."])
def test_what_is_read_only_at_the_start_is_named_in_one_line(
    server: Server, service: tinker.ServiceClient, expected: list[float], name: str
) -> None:
    def lock_up() -> None:
        server.kill()
        path = server.home / name
        mode = path.stat().st_mode
        path.chmod(0o500 if path.is_dir() else 0o400)
        said = Log(server)
        server.start(wait=False)
        assert server.wait_for_exit() == 2
        path.chmod(mode)
        (line,) = said.text.splitlines()
        assert line.startswith("tink serve: ")
        assert str(path.resolve()) in line
        assert "read-only" in line or "Permission denied" in line
        server.restart()

    assert train(service, lock_up) == expected


def test_a_home_that_turns_read_only_while_it_runs_stops_nothing_that_is_open(
    server: Server, service: tinker.ServiceClient, expected: list[float], log: Log
) -> None:
    """The journal goes on; another trainer cannot be started, which is told once and tried until it can."""

    def turn() -> None:
        server.home.chmod(0o500)
        server.kill_trainer()
        log.wait_for("cannot be used: Permission denied")
        time.sleep(1.0)
        assert log.count("cannot be used: Permission denied") == 1
        server.home.chmod(0o700)

    try:
        assert train(service, turn) == expected
    finally:
        server.home.chmod(0o700)
