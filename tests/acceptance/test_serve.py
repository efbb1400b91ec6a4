"""`tink serve` as a process: how it starts, refuses to start, stops, and survives its own death."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import tinker
import torch
from tinker import types

from tests.live import LiveServer

pytestmark = pytest.mark.slow


def _refusal(*arguments: str, **environment: str) -> str:
    """What `tink serve` prints when it does not start; it must be short, and no traceback."""
    found = subprocess.run(
        [sys.executable, "-m", "tink.cli.main", "serve", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 2, found.stderr
    assert "Traceback" not in found.stderr
    return found.stderr


def test_a_second_worker_on_the_same_home_stops_with_one_clear_line(live_server: LiveServer) -> None:
    line = _refusal("--home", str(live_server.home), "--port", "0")
    assert line.count("\n") == 1
    assert live_server.process is not None
    assert f"another worker (pid {live_server.process.pid}) is using {live_server.home}" in line


def test_beyond_loopback_it_starts_only_with_keys_or_an_explicit_no_auth(tmp_path: Path) -> None:
    assert "set TINK_API_KEYS" in _refusal("--home", str(tmp_path), "--host", "0.0.0.0", "--port", "0")
    server = LiveServer(tmp_path / "home", TINK_HOST="0.0.0.0", TINK_API_KEYS="tml-a=alice,tml-b=bob")
    try:
        server.start(wait=False)
        server.wait_until_listening()
        sessions = f"{server.url}/api/v1/sessions"
        assert httpx.get(sessions).status_code == 401
        assert httpx.get(sessions, headers={"X-API-Key": "tml-a"}).status_code == 200
    finally:
        server.close()


def test_what_is_configured_wrongly_is_said_in_a_line_each(tmp_path: Path) -> None:
    text = _refusal("--home", str(tmp_path), TINK_PROT="1", MAX_WORKERS="many")
    assert "TINK_PROT: there is no such setting; did you mean TINK_PORT?" in text
    assert "MAX_WORKERS: 'many' is not a whole number" in text


def test_a_port_in_use_is_said_plainly(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        text = _refusal("--home", str(tmp_path), "--port", str(taken.getsockname()[1]))
    assert "cannot listen on 127.0.0.1" in text


def test_a_model_that_cannot_be_loaded_stops_the_start(tmp_path: Path) -> None:
    text = _refusal("--home", str(tmp_path), "--port", "0", TINK_HF_MODEL=str(tmp_path / "nowhere"))
    assert "nowhere" in text


def test_the_start_up_block_says_what_runs_and_how_to_connect(live_server: LiveServer) -> None:
    text = live_server.output()
    for part in (
        "training on HuggingFace",
        "journal.sqlite",
        live_server.url,
        "TINKER_BASE_URL",
        "tink/qwen3-tiny",
    ):
        assert part in text


def _datum(length: int = 24) -> types.Datum:
    tokens = torch.arange(50, 50 + length)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1].tolist()),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": torch.ones(length - 1)},
    )


def _clients(url: str) -> tuple[tinker.ServiceClient, tinker.TrainingClient]:
    service = tinker.ServiceClient(base_url=url, api_key="tml-local")
    return service, service.create_lora_training_client(
        base_model="tink/qwen3-tiny", rank=4, seed=3
    ).result()


def test_sigterm_stops_in_good_order_and_leaves_no_process(own_server: LiveServer) -> None:
    own_server.start()
    _service, training = _clients(own_server.url)
    training.forward_backward([_datum()], "cross_entropy").result()
    trainer = own_server.trainer_pid()
    began = time.monotonic()
    assert own_server.terminate() == 0
    assert time.monotonic() - began < 20
    with pytest.raises(ProcessLookupError):
        os.kill(trainer, 0)
    with sqlite3.connect(own_server.home / "journal.sqlite") as journal:
        assert journal.execute("SELECT kind FROM events ORDER BY seq DESC LIMIT 1").fetchone() == (
            "incarnation_stopped",
        )


def test_a_second_signal_stops_at_once(own_server: LiveServer) -> None:
    own_server.start()
    assert own_server.process is not None
    # A request that is still being sent keeps the drain waiting.
    with socket.create_connection(("127.0.0.1", own_server.port)) as slow:
        slow.sendall(b"POST /api/v1/create_session HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        own_server.process.send_signal(signal.SIGTERM)
        own_server.wait_for_output("stopping")
        own_server.process.send_signal(signal.SIGTERM)
        assert own_server.process.wait(timeout=5) == 128 + signal.SIGTERM


def test_the_client_carries_on_after_kill_9_of_the_worker(own_server: LiveServer) -> None:
    own_server.start()
    service, training = _clients(own_server.url)
    sampler = training.save_weights_and_get_sampling_client().result()
    step = types.AdamParams(learning_rate=1e-3)
    pending = [
        (training.forward_backward([_datum()] * 8, "cross_entropy"), training.optim_step(step))
        for _ in range(6)
    ]
    prompt = types.ModelInput.from_ints([1, 2, 3])
    params = types.SamplingParams(max_tokens=8, seed=5)
    samples = [sampler.sample(prompt, num_samples=1, sampling_params=params) for _ in range(4)]
    pending[0][0].result()

    own_server.kill()
    trainer = own_server.trainer_pid()
    own_server.start()
    assert own_server.trainer_pid() == trainer, "the trainer is adopted, with all it holds"

    steps = [step.result().metrics for _forward, step in pending]
    assert [metrics["step"] for metrics in steps if metrics] == [1, 2, 3, 4, 5, 6]
    tokens = {tuple(sample.result().sequences[0].tokens) for sample in samples}
    assert len(tokens) == 1, "the same seed gives the same sample, before and after"
    later = training.optim_step(step).result().metrics
    assert later is not None
    assert later["step"] == 7
    assert service.create_lora_training_client(base_model="tink/qwen3-tiny", rank=4).result() is not None


def test_a_submit_sent_again_after_a_restart_is_the_same_job(own_server: LiveServer) -> None:
    own_server.start()
    with httpx.Client(headers={"X-API-Key": "tml-local"}, timeout=60) as http:

        def post(path: str, **body: object) -> httpx.Response:
            return http.post(f"{own_server.url}/api/v1/{path}", json=body)

        session = post("create_session", tags=[], sdk_version="test").json()["session_id"]
        create = {
            "session_id": session,
            "model_seq_id": 0,
            "base_model": "tink/qwen3-tiny",
            "lora_config": {"rank": 2},
        }
        made = post("create_model", **create).json()
        model = f"{session}:train:0"
        step = {"model_id": model, "seq_id": 1, "adam_params": {"learning_rate": 1e-3}}
        first = post("optim_step", **step).json()
        result = post("retrieve_future", request_id=first["request_id"], allow_metadata_only=False).json()
        assert result["metrics"]["step"] == 1

        own_server.kill()
        own_server.start()
        assert post("create_model", **create).json() == made
        assert post("optim_step", **step).json() == first
        changed = {**step, "adam_params": {"learning_rate": 1.0}}
        assert post("optim_step", **changed).json() == first
        again = post("retrieve_future", request_id=first["request_id"], allow_metadata_only=False)
        assert again.json() == result
    with sqlite3.connect(own_server.home / "journal.sqlite") as journal:
        assert journal.execute("SELECT count(*) FROM jobs WHERE op = 'optim_step'").fetchone() == (1,)
