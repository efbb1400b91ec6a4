"""tools/examples/: what users copy does what it says, against a real server, as a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.live import LiveServer

ROOT = Path(__file__).resolve().parents[2]

LAST_LINES = {
    "sft": r"sft: loss \d+\.\d+ -> 0\.\d+, 4 of 4 answers right",
    "rl": r"rl: reward 0\.\d+ -> 0\.\d+ in 12 steps",
    "dpo": r"dpo: margin -?0\.000 -> \d+\.\d+ in 10 steps",
    "resume": r"resume: 8 of 8 losses the same, bit for bit, after kill -9 at step 6",
}


def test_every_example_is_here() -> None:
    assert {path.stem for path in (ROOT / "tools/examples").glob("*.py")} == set(LAST_LINES)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAST_LINES)
def test_example_does_what_it_says(name: str, live_server: LiveServer, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "tools/examples" / f"{name}.py"],
        # Not the checkout: an example needs the SDK alone, and Tink through its address only.
        cwd=tmp_path,
        env={**os.environ, "TINKER_BASE_URL": live_server.url, "TINKER_API_KEY": "tml-local"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    shown = f"{run.stdout}\n{run.stderr}"
    assert run.returncode == 0, shown
    assert re.fullmatch(LAST_LINES[name], run.stdout.splitlines()[-1]), shown
    assert run.stderr == ""
