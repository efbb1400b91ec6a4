"""The parent of the training servers: real forks of a process that has no torch in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tink
from tests.processes import kill

# Each server says who it is, and how it was armed; then it does what a line on standard input says.
PROGRAM = """
import os, signal, sys
from tink import crash
from tink.logs import configure_logs
from tink.trainer.preload import Preloaded
from tink.world import World

class Clock(World):
    time = 0.0
    def monotonic(self):
        self.time += float(sys.argv[1])
        return self.time

def run():
    signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
    print(os.getpid(), os.getppid(), crash._armed, flush=True)
    line = os.read(0, 1).decode()
    return int(line)

configure_logs("info")
crash.arm("trainer.kept")
status = Preloaded(run, Clock()).serve()
print("returned", status, flush=True)
sys.exit(status)
"""


class Parent:
    def __init__(self, life: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(life)],
            cwd=Path(tink.__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.pids: list[int] = []

    def server(self) -> tuple[int, str]:
        """The next one's pid, and where it is to crash."""
        pid, parent, armed = self.line().split()
        assert int(parent) == self.process.pid
        self.pids.append(int(pid))
        return int(pid), armed

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, status: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(str(status))
        self.process.stdin.flush()


@pytest.fixture(params=[10.0])
def parent(request: pytest.FixtureRequest) -> Iterator[Parent]:
    """Its servers live for so many seconds, by its clock."""
    parent = Parent(request.param)
    yield parent
    parent.process.kill()
    for pid in parent.pids:
        kill(pid)
    parent.process.communicate()


def test_a_server_that_is_killed_is_followed_by_another(parent: Parent) -> None:
    seen = set()
    for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGKILL, signal.SIGKILL):
        pid, _ = parent.server()
        seen.add(pid)
        os.kill(pid, number)
    seen.add(parent.server()[0])
    assert len(seen) == 5


def test_the_first_server_alone_has_the_crash_point(parent: Parent) -> None:
    pid, armed = parent.server()
    assert armed == "trainer.kept"
    os.kill(pid, signal.SIGKILL)
    assert parent.server()[1] == "None"


@pytest.mark.parametrize("status", [0, 2])
def test_one_that_ends_by_itself_is_the_end(parent: Parent, status: int) -> None:
    parent.server()
    parent.tell(status)
    assert [parent.line(), parent.line()] == [f"returned {status}"] * 2, "in the child and in the parent"
    assert parent.process.wait(20) == status


def test_sigterm_is_handed_on_and_nothing_comes_after_it(parent: Parent) -> None:
    parent.server()
    parent.process.terminate()
    assert parent.line() == "returned 7"
    assert parent.process.wait(20) == 7


def test_sigterm_while_the_server_is_killed_is_the_end(parent: Parent) -> None:
    pid, _ = parent.server()
    os.kill(pid, signal.SIGSTOP)
    parent.process.terminate()
    os.kill(pid, signal.SIGKILL)
    assert parent.line() == "returned 0"
    assert parent.process.wait(20) == 0


@pytest.mark.parametrize("parent", [0.1], indirect=True)
def test_the_third_that_is_killed_at_once_takes_the_parent_with_it(parent: Parent) -> None:
    for _ in range(3):
        assert parent.process.poll() is None
        pid, _ = parent.server()
        os.kill(pid, signal.SIGKILL)
    assert parent.process.wait(20) == -signal.SIGKILL
