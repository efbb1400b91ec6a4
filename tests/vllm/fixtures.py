"""Real vLLM servers for tests. TINK_TEST_VLLM: 0 goes without, and the summary says so; a directory is a
virtual environment that has vLLM; without it `tools/vllm-venv` makes one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.server import VllmReplica

ROOT = Path(__file__).parents[2]


def find_python() -> Path:
    """The Python of an environment with vLLM, made now if need be."""
    wanted = os.environ.get("TINK_TEST_VLLM", "")
    if wanted:
        return Path(wanted) / "bin" / "python"
    made = subprocess.run([ROOT / "tools" / "vllm-venv"], stdout=subprocess.PIPE, text=True, check=True)
    return Path(made.stdout.strip())


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    if os.environ.get("TINK_TEST_VLLM") == "0":
        pytest.skip("TINK_TEST_VLLM=0: nothing is checked against a real vLLM")
    return find_python()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model, which both sides load. Built in a process of its own: it parses the standard
    library, and Python 3.11's parser fails when threads (the SDK leaves some) print tracebacks too."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    subprocess.run([sys.executable, "-m", "tink.trainer.tiny", directory], cwd=ROOT, check=True)
    return directory


@pytest.fixture(scope="session")
def vllm_replica(
    vllm_python: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmReplica]:
    """A server that many tests share: none of them may kill it, or leave an adapter there."""
    server = VllmReplica(vllm_python, tiny_model, tmp_path_factory.mktemp("vllm") / "log")
    try:
        server.start()
        yield server
    finally:
        server.close()
