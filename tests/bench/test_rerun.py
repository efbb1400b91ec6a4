"""The bench trains a model and trains it again."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_bench_prints_a_row_for_each_figure() -> None:
    """In a process of its own: the SDK leaves threads and sockets behind."""
    command = [
        sys.executable,
        "-m",
        "tests.bench",
        "rerun",
        "--steps",
        "2",
        "--runs",
        "1",
        "--sequences",
        "2",
    ]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    names = re.findall(r"^(\w+) [\d.,]+ ", done.stdout, re.MULTILINE)
    assert names == ["rerun_seconds", "rerun_command", "rerun_speed"]
