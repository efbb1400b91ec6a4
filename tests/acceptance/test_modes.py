"""The modes of the configuration guide, each by the lines of the README that start it, in any order."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import httpx
import numpy as np
import pytest
import tinker
from tinker import types

from tests.live import LiveServer, LiveTrainer
from tests.vllm.server import VllmReplica

pytestmark = pytest.mark.slow

README = Path(__file__).parents[2] / "README.md"
PROMPT = types.ModelInput.from_ints([413, 266])


class Mode:
    """What the README's lines of a mode start, on ports and in folders of its own. `trainer` and `vllm`
    None: it has none."""

    def __init__(self, number: int, model: Path, folder: Path, vllm_python: Path | None = None) -> None:
        text = re.split(r"^## ", README.read_text(), flags=re.MULTILINE)
        (section,) = [part for part in text if part.startswith("Modes\n")]
        block = re.search(rf"^    # {number}: .*\n((?:    .+\n)+)", section, re.MULTILINE)
        assert block is not None
        commands = [shlex.split(line) for line in block[1].splitlines()]
        (served,) = [line for line in commands if line[-2:] == ["tink", "serve"]]
        environment = dict(word.split("=") for word in served[:-2])
        self.trainer: LiveTrainer | None = None
        self.vllm: VllmReplica | None = None
        for command in commands:
            match command:
                case ["tink", "trainer", *options, "--model", _, "--port", "5000"]:
                    home = folder / "home"
                    self.trainer = LiveTrainer(home, *options, "--model", model)
                    self.trainer.log = folder / "trainer.log"
                    environment["MEGATRON_SERVER_URL"] = self.trainer.url
                case ["tink", "vllm", _, "--port", "8000"]:
                    assert vllm_python is not None
                    self.vllm = VllmReplica(vllm_python, model, folder / "vllm.log")
                    environment["VLLM_BASE_URL"] = self.vllm.url
                case _:
                    assert command is served
        self.tink = LiveServer(folder / "home", **environment)

    def service(self) -> tinker.ServiceClient:
        return tinker.ServiceClient(base_url=self.tink.url, api_key="tml-local")

    def base_model(self) -> str:
        answer = httpx.get(
            f"{self.tink.url}/api/v1/get_server_capabilities",
            headers={"X-API-Key": "tml-local"},
            timeout=120,
        )
        return str(answer.json()["supported_models"][0]["model_name"])

    def status(self) -> str:
        command = [sys.executable, "-m", "tink.cli.main", "status", "--home", str(self.tink.home)]
        environment = {**os.environ, "COLUMNS": "200"}
        return subprocess.run(command, env=environment, capture_output=True, text=True).stdout

    def close(self) -> None:
        self.tink.close()
        if self.trainer is not None:
            self.trainer.kill()
        if self.vllm is not None:
            self.vllm.close()


@pytest.fixture
def megatron() -> None:
    if find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed")


@pytest.fixture
def mode_2(megatron: None, tiny_model: Path, tmp_path: Path) -> Iterator[Mode]:
    mode = Mode(2, tiny_model, tmp_path)
    yield mode
    mode.close()


@pytest.fixture
def mode_1(megatron: None, vllm_python: Path, tiny_model: Path, tmp_path: Path) -> Iterator[Mode]:
    mode = Mode(1, tiny_model, tmp_path, vllm_python)
    yield mode
    mode.close()


@pytest.fixture
def mode_3(vllm_python: Path, tiny_model: Path, tmp_path: Path) -> Iterator[Mode]:
    mode = Mode(3, tiny_model, tmp_path, vllm_python)
    yield mode
    mode.close()


def train(mode: Mode) -> tinker.TrainingClient:
    service, name = mode.service(), mode.base_model()
    training = service.create_lora_training_client(base_model=name, rank=4, seed=1).result()
    tokens = [413, 266, 161, 539, 276]
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * 4},
    )
    losses = []
    for _ in range(3):
        losses.append(training.forward_backward([datum], "cross_entropy").result().metrics["loss:sum"])
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    assert losses[-1] < losses[0] / 2
    return training


def check_samples(training: tinker.TrainingClient) -> None:
    """What is sampled has the log-probabilities that training gives it."""
    sampler = training.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=8, seed=1)
    (sample,) = sampler.sample(PROMPT, num_samples=1, sampling_params=params).result().sequences
    tokens = [*PROMPT.to_ints(), *sample.tokens]
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
    )
    (found,) = training.forward([datum], "cross_entropy").result().loss_fn_outputs
    np.testing.assert_allclose(sample.logprobs, found["logprobs"].data[-len(sample.tokens) :], atol=1e-4)


@pytest.mark.parametrize("first", ["worker", "trainer"])
def test_mode_2_trains_and_samples_on_megatron(mode_2: Mode, first: str) -> None:
    assert mode_2.trainer is not None
    if first == "worker":
        mode_2.tink.start(wait=False)
        mode_2.tink.wait_for_output("trainer lost", mode_2.trainer.url)
        assert re.search(r"trainer +awaited: .* does not answer", mode_2.status()), mode_2.status()
        mode_2.trainer.start()
    else:
        mode_2.trainer.start()
        mode_2.trainer.wait_until_ready()
        mode_2.tink.start(wait=False)
    mode_2.tink.wait_until_ready()
    assert "training on Megatron, sampling on Megatron" in mode_2.tink.output()
    assert re.search(r"trainer +ready *\n", mode_2.status()), mode_2.status()
    check_samples(train(mode_2))


def test_mode_1_trains_on_megatron_and_samples_on_vllm(mode_1: Mode) -> None:
    assert mode_1.trainer is not None
    assert mode_1.vllm is not None
    mode_1.tink.start(wait=False)
    mode_1.tink.wait_until_listening()
    status = mode_1.status()
    assert re.search(r"trainer +awaited", status), status
    assert re.search(rf"vllm +\S+, {mode_1.vllm.url}: ", status), status
    mode_1.vllm.start(wait=False)
    mode_1.trainer.start()
    check_samples(train(mode_1))
    assert "training on Megatron, sampling on vLLM" in mode_1.tink.output()
    assert mode_1.vllm.metric("generation_tokens_total") >= 8


def test_mode_3_samples_on_vllm_and_trains_nothing(mode_3: Mode) -> None:
    assert mode_3.vllm is not None
    assert mode_3.trainer is None
    mode_3.tink.start(wait=False)
    mode_3.tink.wait_until_listening()
    assert re.search(rf"vllm +\S+, {mode_3.vllm.url}: ", mode_3.status()), mode_3.status()
    mode_3.vllm.start(wait=False)
    name = mode_3.base_model()
    sampler = mode_3.service().create_sampling_client(base_model=name).result()
    params = types.SamplingParams(max_tokens=8, seed=1)
    assert sampler.sample(PROMPT, num_samples=2, sampling_params=params).result().sequences
    # The worker reads text with the tokenizer of the model that vLLM names.
    sent = {"base_model": name, "prompts": ["A journal"], "sampling_params": {"max_tokens": 8, "seed": 1}}
    (sequence,) = httpx.post(f"{mode_3.tink.url}/sample", json=sent, timeout=120).json()["sequences"]
    assert sequence["text"]
    with pytest.raises(tinker.TinkerError) as error:
        mode_3.service().create_lora_training_client(base_model=name, rank=4).result()
    assert "Training not supported in non-Megatron mode" in str(error.value)
    assert "training on none, sampling on vLLM" in mode_3.tink.output()
