"""Megatron modes: the training server is somebody else's process, with GPUs of its own; whoever starts
first, and whoever dies, the client goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tinker
from tinker import types

from tests.live import LiveServer, LiveTrainer

pytestmark = pytest.mark.slow

TOKEN = "of this test"
STEP = types.AdamParams(learning_rate=1e-2)


@pytest.fixture
def external(tmp_path: Path) -> Iterator[LiveTrainer]:
    artifacts = tmp_path / "home" / "artifacts"
    trainer = LiveTrainer(tmp_path / "trainer", "--artifacts", artifacts, TINK_TRAINER_TOKEN=TOKEN)
    yield trainer
    trainer.kill()


@pytest.fixture
def worker(tmp_path: Path, external: LiveTrainer) -> Iterator[LiveServer]:
    server = LiveServer(
        tmp_path / "home",
        USE_MEGATRON="true",
        MEGATRON_SERVER_URL=external.url,
        TINK_TRAINER_TOKEN=TOKEN,
    )
    yield server
    server.close()


def _datum() -> types.Datum:
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
    )


def test_a_training_server_is_waited_for_and_a_run_goes_on_whoever_dies(
    worker: LiveServer, external: LiveTrainer
) -> None:
    worker.start(wait=False)
    worker.wait_until_listening()
    state = httpx.get(f"{worker.url}/healthz").json()["servers"]["trainer"]
    assert state.startswith("awaited"), state
    assert "one training job at a time" in worker.output()
    external.start()
    worker.wait_until_ready()

    service = tinker.ServiceClient(base_url=worker.url, api_key="tml-local")
    training = service.create_lora_training_client(base_model="tink/qwen3-tiny", rank=4, seed=1).result()

    def train() -> float:
        loss = training.forward_backward([_datum()], "cross_entropy")
        training.optim_step(STEP).result()
        return loss.result().metrics["loss:sum"]

    losses = [train() for _ in range(3)]
    external.kill()
    pending = training.forward_backward([_datum()], "cross_entropy"), training.optim_step(STEP)
    external.start()
    losses.append(pending[0].result().metrics["loss:sum"])
    assert (pending[1].result().metrics or {})["step"] == 4
    worker.kill()
    worker.start()
    losses.append(train())

    training = service.create_lora_training_client(base_model="tink/qwen3-tiny", rank=4, seed=1).result()
    assert [train() for _ in range(5)] == losses
    sampler = training.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=4, seed=1)
    sample = sampler.sample(types.ModelInput.from_ints([3, 1]), num_samples=1, sampling_params=params)
    assert sample.result().sequences
    assert worker.terminate() == 0
    assert external.process is not None
    assert external.process.poll() is None, "it is not the worker's to end"
