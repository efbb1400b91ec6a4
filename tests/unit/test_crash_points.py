"""Crash points: named in one place, passed in the code, and deadly when armed."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import tink
from tink import crash
from tink.cli.main import main
from tink.errors import StartupError
from tink.trainer import process

SOURCES = {path: path.read_text() for path in sorted(Path(tink.__file__).parent.rglob("*.py"))}


@pytest.fixture
def deaths(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The signals that this process would have sent to itself."""
    sent: list[int] = []
    monkeypatch.setattr("tink.crash.os.kill", lambda _pid, number: sent.append(number))
    yield sent
    crash.arm("")


def test_every_point_is_passed_by_its_own_process_and_no_other_name_is() -> None:
    passed = {
        (name, "trainer" if "trainer" in path.parts else "worker")
        for path, text in SOURCES.items()
        for name in re.findall(r'crash\.point\("([^"]+)"\)', text)
    }
    assert passed == {(name, name.partition(".")[0]) for name in crash.POINTS}


def test_nothing_happens_unless_it_is_armed(deaths: list[int]) -> None:
    for name in crash.POINTS:
        crash.point(name)
    crash.arm("worker.accepted")
    crash.point("worker.body")
    assert deaths == []


@pytest.mark.parametrize(("at", "nth"), [("worker.body", 1), ("worker.body:1", 1), ("worker.body:3", 3)])
def test_the_process_dies_the_nth_time_that_it_is_there(
    at: str, nth: int, deaths: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    crash.arm(at)
    for passed in range(1, 6):
        crash.point("worker.accepted")
        crash.point("worker.body")
        assert len(deaths) == (passed >= nth)
    assert deaths == [signal.SIGKILL]
    assert re.fullmatch(r"crash point worker\.body, pid \d+\n", capfd.readouterr().err)


def test_threads_that_pass_it_together_are_each_counted(deaths: list[int]) -> None:
    crash.arm("trainer.taken:4000")
    threads = [
        threading.Thread(target=lambda: [crash.point("trainer.taken") for _ in range(1000)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert deaths == [signal.SIGKILL]


def test_it_is_a_sigkill() -> None:
    program = "from tink import crash; crash.arm('worker.body'); crash.point('worker.body'); print('alive')"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, b"")


@pytest.mark.parametrize(
    ("at", "line"),
    [
        ("worker.acepted", "there is no crash point 'worker.acepted'; did you mean worker.accepted?"),
        ("xyzzy:2", "there is no crash point 'xyzzy'"),
        ("worker.body:0", "'0' is not a count (1, 2, ...)"),
        ("worker.body:often", "'often' is not a count (1, 2, ...)"),
    ],
)
def test_what_is_no_point_stops_the_start_with_one_line(
    at: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(StartupError):
        crash.parse(at)
    monkeypatch.setenv("TINK_CRASH_AT", at)
    for command in ("serve", "trainer"):
        assert main([command, "--home", str(tmp_path)]) == 2
        assert capsys.readouterr().err == f"tink {command}: TINK_CRASH_AT: {line}\n"
    assert process.main(["--home", str(tmp_path)]) == 2
    assert not list(tmp_path.iterdir())
