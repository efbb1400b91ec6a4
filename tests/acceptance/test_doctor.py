"""`tink doctor` against each mode, with real servers, and something broken on purpose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.live import LiveServer, LiveTrainer
from tests.vllm.server import VllmReplica

pytestmark = pytest.mark.slow


def diagnosed(home: Path, **variables: str) -> tuple[int, dict[tuple[str, str], str]]:
    """(exit status, (check, state) -> what was said)."""
    command = [sys.executable, "-m", "tink.cli.main", "doctor", "--home", str(home), "--json"]
    environment = {**os.environ, "TINK_PORT": "0", **variables}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    findings: list[dict[str, Any]] = json.loads(done.stdout)["findings"]
    return done.returncode, {
        (one["check"], one["state"]): f"{one['detail']} -> {one['remedy']}" for one in findings
    }


def test_the_embedded_engine(tmp_path: Path) -> None:
    tink = LiveServer(tmp_path / "home")
    try:
        tink.start()
        code, found = diagnosed(tink.home)
        assert code == 0, found
        assert ("trainer", "ok") in found
        tink.kill()
        code, found = diagnosed(tink.home, TINK_HF_MODEL=str(tmp_path / "none"))
        assert code == 1
        assert "there is no directory" in found["settings", "wrong"]
    finally:
        tink.close()


@pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")
def test_megatron_and_vllm(vllm_python: Path, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "home" / "artifacts").mkdir(parents=True)
    trainer = LiveTrainer(tmp_path / "home", "--engine", "megatron", "--model", tiny_model)
    vllm = VllmReplica(vllm_python, tiny_model, tmp_path / "vllm.log", ["--max-lora-rank", "16"])
    modes = {
        "USE_MEGATRON": "true",
        "MEGATRON_SERVER_URL": trainer.url,
        "USE_VLLM": "true",
        "VLLM_BASE_URL": vllm.url,
    }
    try:
        vllm.start()
        code, found = diagnosed(tmp_path / "home", **modes)
        assert code == 1
        assert f"the trainer at {trainer.url} does not answer" in found["trainer", "wrong"]
        trainer.start()
        trainer.wait_until_ready()
        code, found = diagnosed(tmp_path / "home", **modes)
        assert code == 1
        assert ("trainer", "ok") in found
        assert "rank 16 at most, VLLM_MAX_LORA_RANK is 64" in found["lora", "wrong"]
        code, found = diagnosed(tmp_path / "home", **modes, VLLM_MAX_LORA_RANK="16")
        assert code == 0, found
        assert vllm.adapters() == [], "it leaves nothing there"
        elsewhere = tmp_path / "elsewhere"
        code, found = diagnosed(elsewhere, **modes, VLLM_MAX_LORA_RANK="16")
        assert code == 0, "no home yet is no fault"
        vllm.kill()
        code, found = diagnosed(tmp_path / "home", **modes)
        assert code == 1
        assert f"vLLM server can't be reached at {vllm.url}" in found["vllm", "wrong"]
    finally:
        vllm.close()
        trainer.kill()
