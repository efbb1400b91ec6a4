"""What Tink relies on of a vLLM server: checked against the double, and (slow) against a real one, so that
what passes with the double is true."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from trio.abc import Clock
from trio.testing import MockClock

from tests.vllm import language
from tests.vllm.adapters import Adapters
from tests.vllm.double import CONTEXT, Network, VllmDouble
from tests.vllm.server import VllmReplica
from tink.backends.flavour import flavour
from tink.backends.replica import Aborted, AdapterMissing, ReplicaRefused
from tink.backends.vllm import VllmClient
from tink.errors import UserError
from tink.wire import tinker_pb2 as pb
from tink.wire.tink_train import SampleRequest
from tink.world import World

PROMPT = [100, 101, 102, 103, 104, 105]


@dataclass
class Subject:
    """A server under test, and the world in which it is reached."""

    url: str
    world: World
    double: VllmDouble | None
    texts: Any

    async def pause(self) -> None:
        if self.double:
            self.double.pause()
        else:
            await self._post("/pause")

    async def resume(self) -> None:
        if self.double:
            self.double.resume()
        else:
            await self._post("/resume")

    async def _post(self, path: str) -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
            (await client.post(self.url + path)).raise_for_status()


def simulated(double: VllmDouble) -> Subject:
    url = "http://vllm.sim"
    return Subject(url, Network({url: double}), double, language.text)


def real(replica: VllmReplica) -> Subject:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(replica.model)
    return Subject(replica.url, World(), None, tokenizer.decode)


@pytest.fixture(params=["double", pytest.param("real", marks=pytest.mark.slow)])
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    if request.param == "double":
        yield simulated(VllmDouble(token_seconds=0.01))
        return
    replica = request.getfixturevalue("vllm_replica")
    yield real(replica)
    # The others find it as they expect it.
    with httpx.Client(base_url=replica.url, trust_env=False, timeout=30) as client:
        for model in client.get("/v1/models").json()["data"]:
            if model["parent"] is not None:
                client.post("/v1/unload_lora_adapter", json={"lora_name": model["id"]}).raise_for_status()


@pytest.fixture
def clock(request: pytest.FixtureRequest) -> Clock | None:
    """The double runs on simulated time, a real server on its own."""
    params = request.node.callspec.params
    double = "double" in (params.get("subject"), params.get("as_trl_starts_it"))
    return MockClock(autojump_threshold=0) if double else None


@pytest.fixture
async def client(subject: Subject) -> Any:
    async with VllmClient.connect(subject.url, subject.world, slots=8) as client:
        yield client


@pytest.fixture(scope="session")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    made = Adapters(tiny_model, tmp_path_factory.mktemp("adapters"))
    for number in range(10):
        made.make(f"a{number}", seed=number)
    made.make("large", rank=128)
    return made


def asking(**fields: Any) -> SampleRequest:
    return SampleRequest(**{"sample_id": "s", "prompt": PROMPT, "seed": 5, "max_tokens": 8} | fields)


async def ask(client: VllmClient, model: str = "base", **fields: Any) -> pb.SampleResponse:
    sampled = await client.sample(asking(**fields), model=model, max_context=CONTEXT)
    return pb.SampleResponse.FromString(sampled.body)


def ints(data: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(data) // 4}i", data))


def floats(data: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def tokens(response: pb.SampleResponse) -> list[list[int]]:
    return [ints(sequence.tokens) for sequence in response.sequences]


def stops(response: pb.SampleResponse) -> list[bool]:
    return [sequence.stop_reason == pb.STOP_REASON_STOP for sequence in response.sequences]


# -- what it says of itself -------------------------------------------------------------------------


async def test_it_says_what_it_serves(clock: Clock | None, client: VllmClient, adapters: Adapters) -> None:
    served = await client.served()
    assert (served.base_model, served.max_context, served.adapters) == ("base", CONTEXT, {})
    await client.load_adapter("s:train:0@1", str(adapters.root / "a1"))
    assert (await client.served()).adapters == {"s:train:0@1": str(adapters.root / "a1")}
    assert await client.health()


async def test_its_load_counts_what_it_generates(clock: Clock | None, client: VllmClient) -> None:
    before = await client.load()
    await ask(client, num_samples=3, ignore_eos=True)
    after = await client.load()
    assert after.generated - before.generated == 24
    assert (after.running, after.waiting) == (0, 0)


async def test_its_load_shows_what_runs_and_what_waits(
    clock: Clock | None, client: VllmClient, subject: Subject, adapters: Adapters
) -> None:
    """Six adapters, and places for four."""
    for number in range(6):
        await client.load_adapter(f"a{number}", str(adapters.root / f"a{number}"))
    async with trio.open_nursery() as nursery:
        for number in range(6):
            nursery.start_soon(ask_for_long, client, f"a{number}")
        with trio.fail_after(30):
            while True:
                load = await client.load()
                if (load.running, load.waiting) == (4, 2):
                    break
        nursery.cancel_scope.cancel()


async def ask_for_long(client: VllmClient, model: str) -> None:
    await ask(client, model, max_tokens=None, ignore_eos=True)


async def test_its_logprobs_are_the_models_own(clock: Clock | None, client: VllmClient) -> None:
    assert (await client.probe("base")).mode == "raw"


# -- adapters ---------------------------------------------------------------------------------------


async def test_each_adapter_samples_by_its_own_weights(
    clock: Clock | None, client: VllmClient, adapters: Adapters
) -> None:
    answers = [await ask(client, temperature=0.0)]
    for name in ("a1", "a2"):
        await client.load_adapter(name, str(adapters.root / name))
        answers.append(await ask(client, name, temperature=0.0))
    assert len({answer.SerializeToString() for answer in answers}) == 3
    assert await ask(client, "a1", temperature=0.0) == answers[1]


async def test_loading_again_is_harmless_and_another_path_is_refused(
    clock: Clock | None, client: VllmClient, adapters: Adapters
) -> None:
    path = str(adapters.root / "a1")
    await client.load_adapter("a", path)
    await client.load_adapter("a", path)
    with pytest.raises(ReplicaRefused, match=f"another one by this name, from {path}"):
        await client.load_adapter("a", str(adapters.root / "a2"))


async def test_many_loads_at_once_of_one_adapter_all_succeed(
    clock: Clock | None, client: VllmClient, adapters: Adapters
) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(client.load_adapter, "a", str(adapters.root / "a1"))
    assert list((await client.served()).adapters) == ["a"]


async def test_an_unloaded_adapter_is_missing(
    clock: Clock | None, client: VllmClient, adapters: Adapters
) -> None:
    with pytest.raises(AdapterMissing, match="'a'"):
        await ask(client, "a")
    await client.load_adapter("a", str(adapters.root / "a1"))
    await ask(client, "a")
    await client.unload_adapter("a")
    await client.unload_adapter("a")
    with pytest.raises(AdapterMissing, match="'a'"):
        await ask(client, "a")


async def test_what_runs_ends_on_the_weights_it_began_with(
    clock: Clock | None, client: VllmClient, adapters: Adapters
) -> None:
    await client.load_adapter("a", str(adapters.root / "a1"))
    alone = await ask(client, "a", max_tokens=200, ignore_eos=True)
    found: list[pb.SampleResponse] = []

    async def run() -> None:
        found.append(await ask(client, "a", max_tokens=200, ignore_eos=True))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await until_running(client)
        await client.unload_adapter("a")
    assert tokens(found[0]) == tokens(alone)


async def until_running(client: VllmClient) -> None:
    with trio.fail_after(30):
        while not (await client.load()).running:
            await trio.lowlevel.checkpoint()


async def test_a_rank_that_is_too_high_is_refused_with_its_reason(
    clock: Clock | None, client: VllmClient, adapters: Adapters
) -> None:
    with pytest.raises(ReplicaRefused, match="'a': LoRA rank 128 is greater than max_lora_rank 64"):
        await client.load_adapter("a", str(adapters.root / "large"))
    assert await client.health()
    assert (await client.served()).adapters == {}


async def test_an_adapter_without_weights_tells_which_rank_would_be_taken(
    clock: Clock | None, client: VllmClient, tmp_path: Path
) -> None:
    """What `tink doctor` asks with: the rank is looked at before the weights."""
    for rank, says in ((64, "doesn't contain tensors"), (65, "rank 65 is greater than max_lora_rank 64")):
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(ReplicaRefused, match=says):
            await client.load_adapter("a", str(tmp_path))
    assert await client.health()
    assert (await client.served()).adapters == {}


async def test_files_that_are_missing_or_broken_are_refused(
    clock: Clock | None, client: VllmClient, adapters: Adapters, tmp_path: Path
) -> None:
    with pytest.raises(ReplicaRefused, match=f"finds none in {tmp_path}/none"):
        await client.load_adapter("a", f"{tmp_path}/none")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    with pytest.raises(ReplicaRefused, match="double quotes"):
        await client.load_adapter("a", f"{tmp_path}/broken")
    with pytest.raises(ReplicaRefused, match="conflicts with a served base model"):
        await client.load_adapter("base", str(adapters.root / "a1"))
    assert await client.health()
    assert (await client.served()).adapters == {}


async def test_more_adapters_than_it_holds_still_answer(
    clock: Clock | None, client: VllmClient, adapters: Adapters
) -> None:
    """Those it dropped are read from their directories again."""
    names = [f"a{number}" for number in range(10)]
    first = {}
    for name in names:
        await client.load_adapter(name, str(adapters.root / name))
        first[name] = await ask(client, name)
    for name in names:
        assert await ask(client, name) == first[name]


# -- samples ----------------------------------------------------------------------------------------


async def test_the_same_request_has_the_same_answer(clock: Clock | None, client: VllmClient) -> None:
    first = await ask(client, num_samples=3)
    assert await ask(client, num_samples=3) == first
    assert await ask(client, num_samples=3, seed=50) != first
    assert len({tuple(sample) for sample in tokens(first)}) == 3


async def test_sample_i_draws_from_seed_plus_i(clock: Clock | None, client: VllmClient) -> None:
    together = tokens(await ask(client, num_samples=3, seed=7))
    alone = [tokens(await ask(client, seed=seed))[0] for seed in (7, 8, 9)]
    assert together == alone


@pytest.mark.parametrize("seed", [-1, 0, -(2**63), 2**63 - 1])
async def test_any_seed_is_taken(clock: Clock | None, client: VllmClient, seed: int) -> None:
    first = await ask(client, seed=seed, num_samples=2)
    assert await ask(client, seed=seed, num_samples=2) == first
    assert tokens(first)[0] != tokens(first)[1]


async def test_greedy_samples_are_all_the_likeliest_one(clock: Clock | None, client: VllmClient) -> None:
    response = await ask(client, temperature=0.0, num_samples=3, topk_sample_logprobs=1, seed=1)
    assert len(response.sequences) == 3
    for sequence in response.sequences:
        assert ints(sequence.tokens) == ints(sequence.topk_sampled_logprobs.token_ids)
    assert tokens(await ask(client, temperature=0.0, seed=2)) == tokens(response)[:1]
    assert tokens(await ask(client, top_k=1)) == tokens(response)[:1]


@pytest.mark.parametrize(
    ("prompt", "asked", "got"), [(10, 0, 0), (10, 3, 3), (250, None, 6), (250, 100, 6), (255, None, 1)]
)
async def test_the_context_bounds_a_sample(
    clock: Clock | None, client: VllmClient, prompt: int, asked: int | None, got: int
) -> None:
    response = await ask(client, prompt=[50] * prompt, max_tokens=asked, ignore_eos=True, num_samples=2)
    assert [len(sample) for sample in tokens(response)] == [got, got]
    assert stops(response) == [False, False]


async def test_a_prompt_that_fills_the_context_is_the_callers_error(
    clock: Clock | None, client: VllmClient
) -> None:
    with pytest.raises(UserError, match="255"):
        await ask(client, prompt=[50] * CONTEXT, max_tokens=1)


# -- stops ------------------------------------------------------------------------------------------


async def test_a_stop_token_is_part_of_the_sample(clock: Clock | None, client: VllmClient) -> None:
    free = tokens(await ask(client))[0]
    for place in (0, 3, 7):
        stopped = await ask(client, stop_tokens=[free[place], 1023])
        end = free.index(free[place]) + 1
        assert tokens(stopped) == [free[:end]]
        assert len(floats(stopped.sequences[0].logprobs)) == end
        # Also when it is the last one that was asked for.
        assert stops(stopped) == [True]


async def test_the_tokens_of_a_stop_string_are_part_of_the_sample(
    clock: Clock | None, client: VllmClient, subject: Subject
) -> None:
    free = tokens(await ask(client, max_tokens=20, ignore_eos=True))[0]
    # One that takes two tokens, of plain text, to be found again.
    place = next(
        n
        for n in range(2, 19)
        if (text := subject.texts(free[n : n + 2])).isprintable() and "�" not in text
    )
    stopped = await ask(client, max_tokens=20, ignore_eos=True, stop_strings=[text, "no such thing"])
    (found,) = tokens(stopped)
    assert found == free[: len(found)]
    assert len(found) <= place + 2
    assert text in subject.texts(found)
    assert text not in subject.texts(found[:-1])
    assert stops(stopped) == [True]


async def test_the_end_of_a_sequence_is_part_of_it_and_can_be_ignored(
    clock: Clock | None, client: VllmClient
) -> None:
    """At temperature 2 a random model ends one in a few hundred."""
    asked = {"temperature": 2.0, "num_samples": 32, "max_tokens": 100}
    response = await ask(client, **asked)
    ended = [n for n, stop in enumerate(stops(response)) if stop]
    assert ended
    ends = {tokens(response)[n][-1] for n in ended}
    assert len(ends) == 1
    ignored = await ask(client, **asked, ignore_eos=True)
    assert not any(stops(ignored))
    for n in ended:
        free, cut = tokens(ignored)[n], tokens(response)[n]
        assert free[: len(cut)] == cut
        assert len(free) == 100
    # Ignored as the end, and a stop token all the same.
    assert tokens(await ask(client, **asked, ignore_eos=True, stop_tokens=list(ends))) == tokens(response)


async def test_more_stop_strings_than_it_takes_are_the_callers_error(
    clock: Clock | None, client: VllmClient
) -> None:
    with pytest.raises(UserError, match="VLLM_MAX_STOP_STRINGS"):
        await ask(client, stop_strings=list("abcde"))
    await ask(client, stop_strings=list("abcd"))


# -- logprobs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "draw",
    [{}, {"temperature": 0.5}, {"temperature": 1.5, "top_k": 20, "top_p": 0.8}, {"temperature": 0.0}],
)
async def test_sampled_logprobs_are_what_scoring_finds_whatever_the_draw(
    clock: Clock | None, client: VllmClient, adapters: Adapters, draw: dict[str, Any]
) -> None:
    await client.load_adapter("a1", str(adapters.root / "a1"))
    for model in ("base", "a1"):
        (sequence,) = (await ask(client, model, ignore_eos=True, **draw)).sequences
        scored = await ask(
            client, model, prompt=PROMPT + ints(sequence.tokens), prompt_logprobs=True, max_tokens=1
        )
        found = floats(scored.prompt_logprobs)[len(PROMPT) :]
        assert floats(sequence.logprobs) == pytest.approx(found, abs=1e-4)


async def test_only_the_last_n_of_the_prompt_are_scored_when_asked(
    clock: Clock | None, client: VllmClient
) -> None:
    whole = await ask(client, prompt_logprobs=True, topk_prompt_logprobs=2)
    last = await ask(client, prompt_logprobs=True, topk_prompt_logprobs=2, prompt_logprobs_last_n=2)
    assert floats(last.prompt_logprobs)[-2:] == floats(whole.prompt_logprobs)[-2:]
    assert all(value != value for value in floats(last.prompt_logprobs)[:-2])
    assert floats(last.topk_prompt_logprobs.logprobs)[:8] == [-99999.0] * 8
    assert floats(last.topk_prompt_logprobs.logprobs)[8:] == floats(whole.topk_prompt_logprobs.logprobs)[8:]


@pytest.mark.parametrize("k", [1, 5, 20])
async def test_the_likeliest_tokens_are_k_in_order(clock: Clock | None, client: VllmClient, k: int) -> None:
    response = await ask(client, topk_prompt_logprobs=k, topk_sample_logprobs=k, temperature=2.0)
    sequence = response.sequences[0]
    for top, length in ((response.topk_prompt_logprobs, 6), (sequence.topk_sampled_logprobs, 8)):
        assert (top.k, top.length) == (k, length)
        values, ids = floats(top.logprobs), ints(top.token_ids)
        for row in range(0, length * k, k):
            assert values[row : row + k] == sorted(values[row : row + k], reverse=True)
        assert all(len(set(ids[row : row + k])) == k for row in range(k, length * k, k))
    # A sampled token that is not among them is likelier than none of them.
    for step, (token, value) in enumerate(
        zip(ints(sequence.tokens), floats(sequence.logprobs), strict=True)
    ):
        row = slice(step * k, step * k + k)
        assert token in ids[row] or value <= values[row][-1]


async def test_more_likeliest_tokens_than_it_gives_are_the_callers_error(
    clock: Clock | None, client: VllmClient
) -> None:
    for field in ("topk_sample_logprobs", "topk_prompt_logprobs"):
        with pytest.raises(UserError, match=rf"^{field} is 21: .* 20 at most; .*--max-logprobs"):
            await ask(client, **{field: 21})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": [5, 5000]}, "5000 is out of vocabulary"),
        ({"stop_tokens": [5000]}, "stop_token_ids"),
        ({"temperature": 2.5}, "temperature"),
    ],
)
async def test_what_only_the_server_knows_is_the_callers_error_too(
    clock: Clock | None, client: VllmClient, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=f"^vLLM refuses the request: .*{said}"):
        await ask(client, **fields)


async def test_a_prompt_longer_than_its_context_is_the_callers_error(
    clock: Clock | None, client: VllmClient
) -> None:
    """A server that was started again with a smaller one."""
    with pytest.raises(UserError, match="maximum context length"):
        await client.sample(asking(prompt=[5] * 300), model="base", max_context=1000)


# -- a server that was started otherwise ------------------------------------------------------------


@pytest.fixture(params=["double", pytest.param("real", marks=pytest.mark.slow)])
def as_trl_starts_it(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Iterator[Subject]:
    """trl vllm-serve: processed logprobs, no cap on them, and adapters only if the user asks for them."""
    if request.param == "double":
        yield simulated(VllmDouble(runtime_lora=False, logprobs_mode="processed", max_logprobs=1024))
        return
    replica = VllmReplica(
        request.getfixturevalue("vllm_python"),
        tiny_model,
        tmp_path / "log",
        ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"],
        VLLM_ALLOW_RUNTIME_LORA_UPDATING="",
        VLLM_MAX_STOP_STRINGS="64",
    )
    try:
        replica.start()
        yield real(replica)
    finally:
        replica.close()


async def test_what_a_server_was_started_without_is_noticed(
    clock: Clock | None, as_trl_starts_it: Subject, adapters: Adapters
) -> None:
    subject = as_trl_starts_it
    async with VllmClient.connect(subject.url, subject.world, slots=1) as client:
        assert (await client.probe("base")).mode == "processed"
        with pytest.raises(ReplicaRefused, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
            await client.check_takes_adapters()
        with pytest.raises(ReplicaRefused, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
            await client.load_adapter("a", str(adapters.root / "a1"))
        assert await flavour(subject.url, subject.world) == "vllm"
        response = await ask(client, topk_sample_logprobs=64)
        assert response.sequences[0].topk_sampled_logprobs.k == 64


# -- pauses -----------------------------------------------------------------------------------------


async def test_a_pause_aborts_what_runs_and_what_comes_waits(
    clock: Clock | None, client: VllmClient, subject: Subject
) -> None:
    raised: list[Exception] = []
    answered = trio.Event()

    async def cut_off() -> None:
        with pytest.raises(Aborted, match="abort") as caught:
            await ask(client, max_tokens=None, ignore_eos=True)
        raised.append(caught.value)

    async def wait() -> None:
        await ask(client)
        answered.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cut_off)
        await until_running(client)
        await subject.pause()
        try:
            nursery.start_soon(wait)
            with trio.move_on_after(0.3):
                await answered.wait()
            assert not answered.is_set()
            assert len(raised) == 1
            assert await client.health()
        finally:
            await subject.resume()
        with trio.fail_after(30):
            await answered.wait()


async def test_a_cancelled_sample_is_given_up_by_the_server(
    clock: Clock | None, client: VllmClient
) -> None:
    with trio.move_on_after(60) as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_for_long, client, "base")
            await until_running(client)
            nursery.cancel_scope.cancel()
        while (await client.load()).running:
            await trio.lowlevel.checkpoint()
    assert not scope.cancelled_caught
