"""Trained on the HuggingFace engine, sampled on two real vLLM servers, through the real SDK; and whatever
happens to the servers, the clients see no error and the same samples."""

from __future__ import annotations

import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
from tinker import types

from tests.live import LiveServer
from tests.vllm.server import START_SECONDS, VllmReplica

pytestmark = pytest.mark.slow

# What training and sampling may differ by, in float32.
CLOSE = 1e-4
# Three times as many as vLLM has places for in a batch (--max-loras), and more than it keeps in memory
# (--max-cpu-loras).
VERSIONS = 12
# Nothing may hang for so long, whatever happens to the servers.
SECONDS = 120.0

Draws = list[list[int]]


class Pool:
    """`tink serve`, and the vLLM servers that it samples on."""

    def __init__(self, tink: LiveServer, replicas: list[VllmReplica]) -> None:
        self.tink, self.replicas = tink, replicas

    def service(self) -> tinker.ServiceClient:
        return tinker.ServiceClient(base_url=self.tink.url, api_key="tml-local")

    def states(self) -> dict[str, str]:
        found: dict[str, str] = httpx.get(f"{self.tink.url}/healthz").json()["servers"]
        return found

    def wait_until_ready(self) -> None:
        wait_until(
            lambda: all(
                self.states().get(replica.url, "").startswith("ready") for replica in self.replicas
            ),
            lambda: f"not all servers came up: {self.states()}",
        )

    def placements(self) -> dict[tuple[str, str], str]:
        """(adapter version, server) -> state."""
        rows = self._query("SELECT adapter_id, replica, state FROM adapter_placements")
        return {(adapter, replica): state for adapter, replica, state in rows}

    def placed(self, server: VllmReplica) -> set[str]:
        """The adapter versions that the journal says the server has."""
        return {
            adapter
            for (adapter, replica), state in self.placements().items()
            if replica == server.url and state == "loaded"
        }

    def newest(self, model_id: str) -> Path:
        """The directory of a model's newest version."""
        ((directory,),) = self._query(
            "SELECT directory FROM adapters WHERE model_id = ? ORDER BY version DESC LIMIT 1", model_id
        )
        return self.tink.home / "artifacts" / directory

    def _query(self, statement: str, *values: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.tink.home / "journal.sqlite")) as journal:
            return journal.execute(statement, values).fetchall()


def wait_until(
    done: Callable[[], bool], otherwise: Callable[[], str], seconds: float = START_SECONDS
) -> None:
    """Other processes give no event to wait for, so this looks, and again."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.05)


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


@pytest.fixture(scope="module")
def neighbour(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Another `tink serve`, on the same servers. It has less patience with them."""
    tink = LiveServer(
        tmp_path_factory.mktemp("neighbour") / "home",
        **{**pool.tink.environment, "TINK_VLLM_WAIT_SECONDS": "3"},
    )
    try:
        tink.start()
        yield Pool(tink, pool.replicas)
    finally:
        tink.close()


class Trainee:
    """One model, and how to train and sample it."""

    def __init__(self, pool: Pool) -> None:
        self.client = pool.service().create_lora_training_client("tink/qwen3-tiny", rank=8, seed=1).result()
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

    def draw(self, sampler: tinker.SamplingClient, count: int, max_tokens: int = 40) -> Draws:
        return self.begin(sampler, count, max_tokens)()

    def begin(
        self, sampler: tinker.SamplingClient, count: int, max_tokens: int = 40
    ) -> Callable[[], Draws]:
        """Sends the requests of a draw; what is returned waits for their samples."""
        params = [types.SamplingParams(max_tokens=max_tokens, seed=100 * number) for number in range(count)]
        futures = [sampler.sample(self.prompt, num_samples=4, sampling_params=one) for one in params]
        return lambda: [
            list(one.tokens) for future in futures for one in future.result(timeout=SECONDS).sequences
        ]

    def one(self, sampler: tinker.SamplingClient) -> tuple[list[int], list[float]]:
        """Always the same sample, and its log-probabilities by vLLM."""
        params = types.SamplingParams(max_tokens=12, seed=5)
        (sampled,) = sampler.sample(self.prompt, num_samples=1, sampling_params=params).result().sequences
        assert sampled.logprobs is not None
        return list(sampled.tokens), list(sampled.logprobs)

    def again(self, sampled: list[int]) -> list[float]:
        """The log-probabilities of a sample by what is being trained."""
        return self.logprobs(self.tokens[:4] + sampled)[3:]

    def distance(self, sampler: tinker.SamplingClient) -> float:
        """The most by which the sampler's logprobs differ from those of what is being trained."""
        tokens, logprobs = self.one(sampler)
        scored = sampler.compute_logprobs(types.ModelInput.from_ints(self.tokens)).result()
        return max(far(self.again(tokens), logprobs), far(self.logprobs(self.tokens), scored[1:]))

    def _datum(self, tokens: list[int]) -> types.Datum:
        return types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
        )


def far(trained: list[float], scored: list[float | None]) -> float:
    """The most by which they differ."""
    return max(abs(a - b) for a, b in zip(trained, scored, strict=True) if b is not None)


class Versions:
    """Of one model: what each drew alone, and the log-probabilities that training gave a sample of it."""

    def __init__(self, pool: Pool) -> None:
        self.trainee = Trainee(pool)
        self.samplers: list[tinker.SamplingClient] = []
        self.trained: list[list[float]] = []
        self.drawn: list[Draws] = []
        for _ in range(VERSIONS):
            self.trainee.train(1)
            self.samplers.append(self.trainee.save())
            self.trained.append(self.trainee.again(self.trainee.one(self.samplers[-1])[0]))
            self.drawn.append(self._begin_one(self.samplers[-1])())

    def begin(self) -> Callable[[], list[Draws]]:
        """A draw of all of them at once."""
        begun = [self._begin_one(sampler) for sampler in self.samplers]
        return lambda: [answers() for answers in begun]

    def distance(self) -> float:
        """The most by which their log-probabilities differ from those that training gave."""
        pairs = zip(self.trained, self.samplers, strict=True)
        return max(far(trained, self.trainee.one(sampler)[1]) for trained, sampler in pairs)

    def _begin_one(self, sampler: tinker.SamplingClient) -> Callable[[], Draws]:
        return self.trainee.begin(sampler, 1, max_tokens=100)


@pytest.fixture(scope="module")
def versions(pool: Pool) -> Versions:
    return Versions(pool)


def test_each_version_has_the_trainers_logprobs_on_every_server(pool: Pool) -> None:
    trainee = Trainee(pool)
    version = f"{trainee.client.model_id}@0"
    for replica in pool.replicas:
        assert any(version in name for name in replica.adapters()), "a new model can be sampled"
    worst = 0.0
    for _ in range(3):
        trainee.train()
        sampler = trainee.save()
        worst = max(worst, trainee.distance(sampler), trainee.distance(sampler))
    print(f"trainer and vLLM differ by {worst:.2e} at most")
    assert worst < CLOSE
    # Version 0 has no sampler: it goes when there is a newer one.
    kept = {
        (f"{trainee.client.model_id}@{number}", replica.url)
        for number in (1, 2, 3)
        for replica in pool.replicas
    }
    # A server that was slow for a while has them again when it is looked at.
    wait_until(
        lambda: kept <= {place for place, state in pool.placements().items() if state == "loaded"},
        lambda: f"{pool.placements()} on {pool.states()}",
    )


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


def test_more_versions_than_a_server_has_places_for_are_each_themselves(
    pool: Pool, versions: Versions
) -> None:
    assert versions.begin()() == versions.drawn
    assert len({str(drawn) for drawn in versions.drawn}) == VERSIONS
    assert versions.distance() < CLOSE


def test_a_server_that_is_drained_loses_no_sample_and_has_its_versions_when_it_is_back(
    pool: Pool, versions: Versions
) -> None:
    victim, newest = pool.replicas[0], f"{versions.trainee.client.model_id}@{VERSIONS}"
    begun = begin_on(victim, versions)
    victim.terminate()
    begun.append(versions.begin())
    assert [answers() for answers in begun] == [versions.drawn] * len(begun)
    assert victim.process is not None
    victim.process.wait(timeout=30)
    victim.start()
    pool.wait_until_ready()
    assert any(newest in name for name in victim.adapters())
    assert versions.distance() < CLOSE
    assert versions.begin()() == versions.drawn


def test_a_server_that_is_paused_hands_its_samples_over_and_is_taken_again(
    pool: Pool, versions: Versions
) -> None:
    victim = pool.replicas[1]
    begun = begin_on(victim, versions)
    victim.pause()
    try:
        assert [answers() for answers in begun] == [versions.drawn] * len(begun)
        assert pool.states()[victim.url].startswith("awaited: ")
    finally:
        victim.resume()
    expect_taken_again(pool, versions, victim)


def test_a_server_that_hangs_hands_its_samples_over_and_is_taken_again(
    pool: Pool, versions: Versions
) -> None:
    victim = pool.replicas[0]
    begun = begin_on(victim, versions)
    victim.hang()
    try:
        assert [answers() for answers in begun] == [versions.drawn] * len(begun)
        assert pool.states()[victim.url].startswith("awaited: ")
    finally:
        victim.recover()
    expect_taken_again(pool, versions, victim)


def begin_on(victim: VllmReplica, versions: Versions) -> list[Callable[[], list[Draws]]]:
    """Draws of all versions, one begun after the other, until this server has some of them to do."""
    begun: list[Callable[[], list[Draws]]] = []
    while not victim.metric("num_requests_running"):
        assert len(begun) < 8, "it is given nothing to do"
        begun.append(versions.begin())
        time.sleep(0.3)
    return begun


def expect_taken_again(pool: Pool, versions: Versions, victim: VllmReplica) -> None:
    pool.wait_until_ready()
    begun = begin_on(victim, versions)
    assert [answers() for answers in begun] == [versions.drawn] * len(begun)


def test_two_workers_on_the_same_servers_leave_each_others_adapters_alone(
    pool: Pool, neighbour: Pool
) -> None:
    pairs = []
    for steps, worker in ((2, pool), (4, neighbour)):
        trainee = Trainee(worker)
        trainee.train(steps)
        sampler = trainee.save()
        pairs.append((trainee, sampler, trainee.draw(sampler, 4)))
        assert trainee.distance(sampler) < CLOSE
    theirs = pairs[1][0].client.model_id

    def others() -> list[set[str]]:
        return [{name for name in replica.adapters() if theirs not in name} for replica in pool.replicas]

    def is_stopped_at_rest() -> bool:
        """The first worker loads what is newer, and unloads, beside its samples."""
        pool.tink.stop()
        placed = [pool.placed(replica) for replica in pool.replicas]
        if placed == [{_version(name) for name in names} for names in others()]:
            return True
        pool.tink.resume()
        return False

    wait_until(is_stopped_at_rest, lambda: f"{others()} is not what the first worker has placed")
    try:
        before = others()
        # When it starts it looks at what is loaded, and unloads what it needs no more.
        neighbour.tink.kill()
        neighbour.tink.start()
        neighbour.wait_until_ready()
        assert others() == before
    finally:
        pool.tink.resume()
    for trainee, sampler, drawn in pairs:
        assert trainee.draw(sampler, 4) == drawn
        assert trainee.distance(sampler) < CLOSE
    assert pairs[0][2] != pairs[1][2]


def _version(name: str) -> str:
    """By the name that a server has it as."""
    return name.rpartition("/")[2].rpartition("-")[0]


class Outage:
    """No server is left for a while. A sample is asked for meanwhile, and files are damaged."""

    def __init__(self, pool: Pool, neighbour: Pool) -> None:
        self.trainee, self.damaged = Trainee(pool), Trainee(pool)
        self.trainee.train()
        self.sampler = self.trainee.save()
        self.expected = self.trainee.draw(self.sampler, 4)
        self.damaged.train(3)
        self.damaged_sampler = self.damaged.save()
        self.healthy = self.damaged.draw(self.damaged_sampler, 1)
        theirs = neighbour.service().create_sampling_client(base_model="tink/qwen3-tiny").result()
        for replica in pool.replicas:
            replica.kill()
        answers = self.trainee.begin(self.sampler, 4)
        weights = pool.newest(self.damaged.client.model_id) / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        with pytest.raises(tinker.TinkerError) as failure:
            self.trainee.draw(theirs, 1)
        self.impatient = str(failure.value)
        for replica in pool.replicas:
            replica.start(wait=False)
        self.answers = answers()
        pool.wait_until_ready()


@pytest.fixture(scope="module")
def outage(pool: Pool, neighbour: Pool) -> Outage:
    return Outage(pool, neighbour)


def test_without_any_server_a_sample_waits_for_one_to_come_back(outage: Outage) -> None:
    assert outage.answers == outage.expected


def test_who_waits_too_long_for_a_server_is_told_where_and_what_to_do(pool: Pool, outage: Outage) -> None:
    assert "vLLM server can't be reached" in outage.impatient
    assert all(replica.url in outage.impatient for replica in pool.replicas)
    assert "start it (tink vllm), or set VLLM_BASE_URL" in outage.impatient


def test_a_version_whose_file_is_damaged_fails_with_the_reason_and_alone(
    pool: Pool, outage: Outage
) -> None:
    with pytest.raises(tinker.TinkerError, match=r"adapter_model\.safetensors is damaged"):
        outage.damaged.draw(outage.damaged_sampler, 1)
    assert set(pool.states().values()) == {"ready"}
    assert outage.trainee.draw(outage.sampler, 4) == outage.expected
    # Its model is unharmed: what is saved now can be sampled.
    again = outage.damaged.save()
    assert outage.damaged.draw(again, 1) == outage.healthy


def test_an_adapter_that_vllm_refuses_fails_its_job_with_the_reason(pool: Pool) -> None:
    with pytest.raises(tinker.TinkerError, match="LoRA rank 128 is greater than max_lora_rank 64"):
        pool.service().create_lora_training_client("tink/qwen3-tiny", rank=128).result()


def test_a_server_that_takes_no_adapters_serves_the_base_model_and_says_how_to_start_it(
    vllm_python: Path, tiny_model: Path, tmp_path: Path
) -> None:
    replica = VllmReplica(
        vllm_python, tiny_model, tmp_path / "vllm.log", VLLM_ALLOW_RUNTIME_LORA_UPDATING=""
    )
    tink = LiveServer(tmp_path / "home", USE_HF="true", USE_VLLM="true", VLLM_BASE_URL=replica.url)
    try:
        replica.start(wait=False)
        tink.start()
        pool = Pool(tink, [replica])
        pool.wait_until_ready()
        assert pool.states()[replica.url].startswith("ready, for the base model alone")
        remedy = re.escape("start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora")
        with pytest.raises(tinker.TinkerError, match=remedy):
            pool.service().create_lora_training_client("tink/qwen3-tiny", rank=8).result()
        base = pool.service().create_sampling_client(base_model="tink/qwen3-tiny").result()
        prompt = types.ModelInput.from_ints([5, 6, 7])
        params = types.SamplingParams(max_tokens=4, seed=1)
        sampled = base.sample(prompt, num_samples=2, sampling_params=params).result().sequences
        assert [len(one.tokens) for one in sampled] == [4, 4]
    finally:
        tink.close()
        replica.close()
