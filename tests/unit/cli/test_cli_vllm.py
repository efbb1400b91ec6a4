"""`tink vllm` starts vLLM with what Tink needs of it, and with nothing that vLLM would misread."""

from __future__ import annotations

import shlex
import stat
from dataclasses import fields

import pytest

from tink.cli import vllm
from tink.settings import Settings

PROGRAM = """#!/bin/sh
echo "$0 $*"
env | grep ^VLLM_ | sort
exit 7
"""


@pytest.fixture
def model(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in (*vllm.OURS, "TINK_HF_MODEL", "TINK_HF_MODEL_NAME"):
        monkeypatch.delenv(name, raising=False)
    return folder


def printed(tink, *words):
    code, out, _ = tink("vllm", *words, "--print")
    assert code == 0
    return shlex.split(out)


def test_it_serves_the_model_with_adapters_and_raw_logprobs(tink, model):
    words = printed(tink, model, "--name", "my/model", "--port", "8001")
    assert words[:2] == ["VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", "VLLM_MAX_STOP_STRINGS=64"]
    assert words[2:5] == ["vllm", "serve", str(model)]
    options = dict(zip(words[5::2], words[6::2], strict=False))
    assert options["--served-model-name"] == "my/model"
    assert (options["--host"], options["--port"]) == ("127.0.0.1", "8001")
    assert "--enable-lora" in words
    assert words[words.index("--logprobs-mode") + 1] == "raw_logprobs"


def test_the_guides_variables_are_passed_on(tink, model, monkeypatch):
    for name, value in {
        "VLLM_HOST": "0.0.0.0",
        "VLLM_PORT": "9000",
        "VLLM_GPU_MEMORY_UTIL": "0.5",
        "VLLM_MAX_LORAS": "8",
        "VLLM_MAX_LORA_RANK": "128",
    }.items():
        monkeypatch.setenv(name, value)
    words = printed(tink, model)
    for option, value in {
        "--host": "0.0.0.0",
        "--port": "9000",
        "--gpu-memory-utilization": "0.5",
        "--max-loras": "8",
        "--max-cpu-loras": "64",
        "--max-lora-rank": "128",
    }.items():
        assert words[words.index(option) + 1] == value
    monkeypatch.setenv("VLLM_ENABLE_LORA", "false")
    assert "--enable-lora" not in printed(tink, model)


def test_it_becomes_vllm_and_keeps_tinks_variables_from_it(tink, model, tmp_path, monkeypatch):
    program = tmp_path / "vllm"
    program.write_text(PROGRAM)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("VLLM_PORT", "9000")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    replaced = []
    monkeypatch.setattr("os.execve", lambda *call: replaced.append(call))
    tink("vllm", model, "--vllm", program, "--options", "--max-model-len", "512")
    ((path, words, environment),) = replaced
    assert path == str(program)
    assert words[-2:] == ["--max-model-len", "512"]
    assert "VLLM_PORT" not in environment
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


def test_where_vllm_s_own_processes_meet_is_what_vllm_calls_its_port(tink, model, monkeypatch):
    monkeypatch.setenv("VLLM_PORT", "9000")
    monkeypatch.setenv("VLLM_GROUP_PORT", "9100")
    words = printed(tink, model)
    assert words[words.index("--port") + 1] == "9000"
    assert "VLLM_PORT=9100" in words[: words.index("vllm")]
    environment = vllm.environment(Settings.load({"VLLM_GROUP_PORT": "9100"}), {"VLLM_GROUP_PORT": "9100"})
    assert environment["VLLM_PORT"] == "9100"
    assert "VLLM_GROUP_PORT" not in environment


def test_no_variable_of_tinks_own_reaches_vllm():
    known = {name for field in fields(Settings) for name in field.metadata["names"]}
    # The key is vLLM's own variable, and means the same.
    assert {name for name in known if name.startswith("VLLM_")} - {"VLLM_API_KEY"} == vllm.OURS


def test_without_vllm_it_says_what_to_install(tink, model):
    code, _, err = tink("vllm", model, "--vllm", "no-such-vllm")
    assert code == 2
    assert "install vLLM" in err


@pytest.mark.parametrize(("name", "value"), [("VLLM_GPU_MEMORY_UTIL", "1.5"), ("VLLM_MAX_LORAS", "0")])
def test_a_value_that_cannot_be_is_refused(tink, model, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    code, _, err = tink("vllm", model, "--print")
    assert code == 2
    assert name in err
