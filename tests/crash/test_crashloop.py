"""tools/crashloop, without its virtual environment: real processes, real kills, the real SDK."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.processes import processes_of

ROOT = Path(__file__).resolve().parents[2]
# Seeds whose kills are of all kinds: every victim (either of two training processes), during a recovery,
# and at crash points of worker and trainer. With megatron few end the trainer, whose start takes seconds.
EMBEDDED = ["--kills", "20", "--seed", "14"]
MEGATRON = ["--kills", "10", "--seed", "1781", "--engine", "megatron"]
# And of the database, at random times and while another kill is being recovered from.
POSTGRESQL = ["--kills", "14", "--seed", "3908", "--database", "postgresql"]
ENGINES = [
    pytest.param(EMBEDDED, id="hf"),
    pytest.param(POSTGRESQL, id="postgresql"),
    pytest.param(
        MEGATRON,
        id="megatron",
        marks=pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed"),
    ),
]
LAST_LINE = (
    r"kills={kills} lost=0 doubled=0 client_errors=0 max_abs_diff=0\.0 "
    r"recovery_p50=\d+\.\ds recovery_max=\d+\.\ds"
)

pytestmark = pytest.mark.slow


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.crash.loop", *arguments],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("options", ENGINES)
def test_nothing_is_lost_doubled_or_different_after_kills(tmp_path: Path, options: list[str]) -> None:
    out, err = start(tmp_path, *options).communicate(timeout=600)
    lines = out.splitlines()
    assert lines, err
    assert re.fullmatch(LAST_LINE.format(kills=options[1]), lines[-1]), f"{out}\n{err}"
    assert not processes_of(tmp_path)
    assert not list(tmp_path.glob("tink-crashloop-*")), "a run that went well leaves nothing behind"


@pytest.mark.parametrize("options", ENGINES)
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path, options: list[str]) -> None:
    loop = start(tmp_path, *options)
    assert loop.stderr is not None
    for line in loop.stderr:
        if line.startswith("kill "):
            break
    loop.send_signal(signal.SIGINT)
    out, err = loop.communicate(timeout=100)
    assert loop.returncode == 130, err
    assert out == ""
    assert "crashloop: interrupted, and everything stopped" in err
    assert not processes_of(tmp_path)
    assert not list(tmp_path.glob("tink-crashloop-*"))
