"""tools/concurrent_users without its virtual environment: nobody gets other numbers than alone."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.processes import processes_of

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--steps", "2", "--chats", "2", "--words", "10"]

pytestmark = pytest.mark.slow
needs_megatron = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")


@pytest.mark.parametrize(("engine", "most"), [("hf", 3), pytest.param("megatron", 1, marks=needs_megatron)])
def test_users_at_once_get_what_each_got_alone(engine: str, most: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.users", "3", "--engine", engine, "--keep", tmp_path, "--json"]
    found = subprocess.run([*command, *SHORT], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert (found.returncode, found.stderr) == (0, "")
    document = json.loads(found.stdout)
    assert [user["identical"] for user in document["users"]] == [True] * 3
    assert all(last < first for first, last in (user["losses"] for user in document["users"]))
    assert len({user["losses"][0] for user in document["users"]}) == 3, "each has data of its own"
    assert all(len(user["step_waits_ms"]) == 2 for user in document["users"])
    assert 1 <= document["most_running"] <= most
    assert not processes_of(tmp_path)


def test_without_a_server_it_says_so() -> None:
    command = [sys.executable, "-m", "tests.users", "--url", "http://127.0.0.1:9"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("concurrent_users: ")
    assert len(found.stderr.splitlines()) == 1
