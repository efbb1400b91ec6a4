"""Trained on the HuggingFace engine, sampled on two real vLLM servers, through the real SDK."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import tinker
from tinker import types

from tests.live import LiveServer
from tests.vllm.fixtures import tiny_model, vllm_python
from tests.vllm.server import VllmReplica

__all__ = ["tiny_model", "vllm_python"]

pytestmark = pytest.mark.slow

# What training and sampling may differ by, in float32.
CLOSE = 1e-4


class Pool:
    def __init__(self, tink: LiveServer, replicas: list[VllmReplica]) -> None:
        self.tink, self.replicas = tink, replicas

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 300.0
        while time.monotonic() < deadline:
            states = httpx.get(f"{self.tink.url}/healthz").json()["servers"]
            if all(states.get(replica.url) == "ready" for replica in self.replicas):
                return
            time.sleep(0.2)
        raise AssertionError(f"not all servers came up: {states}")

    def placements(self) -> dict[tuple[str, str], str]:
        """(adapter version, server) -> state."""
        with closing(sqlite3.connect(self.tink.home / "journal.sqlite")) as journal:
            found = journal.execute("SELECT adapter_id, replica, state FROM adapter_placements")
            return {(adapter, replica): state for adapter, replica, state in found}


@pytest.fixture(scope="module")
def pool(vllm_python: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    folder = tmp_path_factory.mktemp("pool")
    replicas = [VllmReplica(vllm_python, tiny_model, folder / f"vllm-{number}.log") for number in range(2)]
    urls = ",".join(replica.url for replica in replicas)
    tink = LiveServer(folder / "home", USE_HF="true", USE_VLLM="true", VLLM_BASE_URL=urls)
    try:
        # Tink first: what is not up yet is waited for.
        tink.start()
        for replica in replicas:
            replica.start(wait=False)
        pool = Pool(tink, replicas)
        pool.wait_until_ready()
        yield pool
    finally:
        tink.close()
        for replica in replicas:
            replica.close()


class Trainee:
    """One model, and how to train and sample it."""

    def __init__(self, pool: Pool) -> None:
        service = tinker.ServiceClient(base_url=pool.tink.url, api_key="tml-local")
        self.client = service.create_lora_training_client("tink/qwen3-tiny", rank=8, seed=1).result()
        self.tokens = self.client.get_tokenizer().encode("A journal is a list of what happened.")
        self.prompt = types.ModelInput.from_ints(self.tokens[:4])

    def logprobs(self, tokens: list[int]) -> list[float]:
        """Of each token but the first, by what is being trained."""
        result = self.client.forward([self._datum(tokens)], "cross_entropy").result()
        return list(result.loss_fn_outputs[0]["logprobs"].data)

    def train(self, steps: int = 2) -> None:
        for _ in range(steps):
            self.client.forward_backward([self._datum(self.tokens)], "cross_entropy")
            self.client.optim_step(types.AdamParams(learning_rate=1e-2)).result()

    def save(self) -> tinker.SamplingClient:
        return self.client.save_weights_and_get_sampling_client().result()

    def draw(self, sampler: tinker.SamplingClient, count: int) -> list[list[int]]:
        params = [types.SamplingParams(max_tokens=40, seed=100 * number) for number in range(count)]
        futures = [sampler.sample(self.prompt, num_samples=4, sampling_params=one) for one in params]
        return [list(one.tokens) for future in futures for one in future.result().sequences]

    def distance(self, sampler: tinker.SamplingClient) -> float:
        """The most by which the sampler's logprobs differ from those of what is being trained."""
        params = types.SamplingParams(max_tokens=12, seed=5)
        sampled = sampler.sample(self.prompt, num_samples=2, sampling_params=params).result().sequences
        worst = 0.0
        for one in sampled:
            mine = self.logprobs(self.tokens[:4] + list(one.tokens))[3:]
            assert one.logprobs is not None
            worst = max(worst, *(abs(a - b) for a, b in zip(mine, one.logprobs, strict=True)))
        scored = sampler.compute_logprobs(types.ModelInput.from_ints(self.tokens)).result()
        mine = self.logprobs(self.tokens)
        return max(worst, *(abs(a - b) for a, b in zip(mine, scored[1:], strict=True) if b is not None))

    def _datum(self, tokens: list[int]) -> types.Datum:
        return types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
        )


def test_each_version_has_the_trainers_logprobs_on_every_server(pool: Pool) -> None:
    trainee = Trainee(pool)
    served = [
        {model["id"] for model in httpx.get(f"{replica.url}/v1/models").json()["data"]}
        for replica in pool.replicas
    ]
    version = f"{trainee.client.model_id}@0"
    assert all(any(version in name for name in names) for names in served), "a new model can be sampled"
    worst = 0.0
    for _ in range(3):
        trainee.train()
        sampler = trainee.save()
        worst = max(worst, trainee.distance(sampler), trainee.distance(sampler))
    print(f"trainer and vLLM differ by {worst:.2e} at most")
    assert worst < CLOSE
    states = pool.placements()
    for number in range(4):
        for replica in pool.replicas:
            assert states[f"{trainee.client.model_id}@{number}", replica.url] == "loaded"


def test_a_server_that_is_killed_and_comes_back_changes_no_sample(pool: Pool) -> None:
    trainee = Trainee(pool)
    trainee.train()
    first = trainee.save()
    expected = trainee.draw(first, 12)
    distance = trainee.distance(first)
    trainee.train()
    second = trainee.save()
    victim = pool.replicas[0]
    threading.Timer(0.3, victim.kill).start()
    assert trainee.draw(first, 12) == expected
    # With one server away.
    trainee.train()
    third = trainee.save()
    assert trainee.distance(third) < CLOSE
    victim.start()
    pool.wait_until_ready()
    assert trainee.draw(first, 12) == expected
    assert trainee.distance(third) < CLOSE
    assert distance < CLOSE
    assert len({tuple(map(tuple, trainee.draw(one, 3))) for one in (first, second, third)}) == 3


def test_an_adapter_that_vllm_refuses_fails_its_job_with_the_reason(pool: Pool) -> None:
    service = tinker.ServiceClient(base_url=pool.tink.url, api_key="tml-local")
    with pytest.raises(tinker.TinkerError, match="LoRA rank 128 is greater than max_lora_rank 64"):
        service.create_lora_training_client("tink/qwen3-tiny", rank=128).result()
