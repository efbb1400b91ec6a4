"""tools/examples/: what users copy does what it says, against a real server, as a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.live import LiveServer
from tests.vllm.server import VllmReplica
from tools.megatron_trainer import MegatronTrainer

ROOT = Path(__file__).resolve().parents[2]

LAST_LINES = {
    "sft": r"sft: loss \d+\.\d+ -> 0\.\d+, 4 of 4 answers right",
    "rl": r"rl: reward 0\.\d+ -> 0\.\d+ in 12 steps",
    "dpo": r"dpo: margin -?0\.000 -> \d+\.\d+ in 10 steps",
    "spike": r"spike: loss 0\.\d+ after step 12",
    "resume": r"resume: 8 of 8 losses the same, bit for bit, after kill -9 at step 6",
}


def test_every_example_is_here() -> None:
    assert {path.stem for path in (ROOT / "tools/examples").glob("*.py")} == set(LAST_LINES)


@pytest.fixture(scope="module")
def split_server(
    vllm_replica: VllmReplica, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """A worker that trains on two processes with megatron-core, and samples on vLLM."""
    folder = tmp_path_factory.mktemp("split")
    trainer = MegatronTrainer(folder / "home", folder / "trainer.log")
    sampling = {"USE_VLLM": "true", "VLLM_BASE_URL": vllm_replica.url}
    server = LiveServer(folder / "home", **trainer.settings, **sampling)
    try:
        trainer.start()
        server.start()
        yield server
    finally:
        server.close()
        trainer.stop()


@pytest.mark.slow
@pytest.mark.parametrize("name", LAST_LINES)
def test_example_does_what_it_says(name: str, live_server: LiveServer, tmp_path: Path) -> None:
    run_example(name, live_server, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")
@pytest.mark.parametrize("name", ["sft", "rl"])
def test_example_runs_on_two_training_processes_and_vllm(
    name: str, split_server: LiveServer, tmp_path: Path
) -> None:
    run_example(name, split_server, tmp_path)


def run_example(name: str, server: LiveServer, folder: Path) -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "tools/examples" / f"{name}.py"],
        # Not the checkout: an example needs the SDK alone, and Tink through its address only.
        cwd=folder,
        env={**os.environ, "TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-local"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    shown = f"{run.stdout}\n{run.stderr}"
    assert run.returncode == 0, shown
    assert re.fullmatch(LAST_LINES[name], run.stdout.splitlines()[-1]), shown
    assert run.stderr == ""
