"""What the double does when it is made to fail. It says what a real one said; simulations build on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.vllm.double import CONTEXT, Network, VllmDouble
from tink.backends.replica import AdapterMissing, ReplicaGone, ReplicaRefused, Silent, Unsent
from tink.backends.vllm import VllmClient
from tink.errors import UserError
from tink.limits import COMPLETION_SECONDS
from tink.wire.samples import Sampled
from tink.wire.tink_train import SampleRequest

URL = "http://vllm.sim"
LONG = {"max_tokens": 200, "ignore_eos": True}


@pytest.fixture
def double() -> VllmDouble:
    return VllmDouble(token_seconds=0.01)


@pytest.fixture
async def client(double: VllmDouble) -> AsyncIterator[VllmClient]:
    async with VllmClient.connect(URL, Network({URL: double}), slots=16) as client:
        yield client


def adapter(root: Path, name: str, rank: int = 8) -> Path:
    (root / name).mkdir()
    (root / name / "adapter_config.json").write_text(json.dumps({"r": rank}))
    (root / name / "adapter_model.safetensors").write_text(name)
    return root / name


def asking(**fields: Any) -> SampleRequest:
    return SampleRequest(**{"sample_id": "s", "prompt": [5, 6], "seed": 1, "max_tokens": 4} | fields)


async def ask(client: VllmClient, model: str = "base", **fields: Any) -> Sampled:
    return await client.sample(asking(**fields), model=model, max_context=CONTEXT)


async def gone(client: VllmClient, said: str, **fields: Any) -> None:
    with pytest.raises(ReplicaGone, match=said):
        await ask(client, **fields)


async def test_what_it_will_answer_is_known_beforehand(
    autojump_clock: MockClock, client: VllmClient, double: VllmDouble, tmp_path: Path
) -> None:
    path = adapter(tmp_path, "a")
    await client.load_adapter("a", str(path))
    fields = {"num_samples": 3, "topk_sample_logprobs": 2, "prompt_logprobs": True}
    base, own = await ask(client, **fields), await ask(client, "a", **fields)
    assert base.body == double.would_answer(asking(**fields), None)
    assert own.body == double.would_answer(asking(**fields), path)
    assert base.body != own.body
    assert [(answered.model, answered.path) for answered in double.answered] == [
        ("base", None),
        ("a", str(path)),
    ]
    assert VllmDouble().would_answer(asking(**fields), path) == own.body


async def test_one_that_is_killed_cuts_off_what_runs_and_comes_back_empty(
    autojump_clock: MockClock, client: VllmClient, double: VllmDouble, tmp_path: Path
) -> None:
    await client.load_adapter("a", str(adapter(tmp_path, "a")))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(gone, client, "refused|reset")
        await trio.sleep(0.01)
        double.kill()
    assert not await client.health()
    await gone(client, "refused")
    double.start()
    assert await client.health()
    assert (await client.served()).adapters == {}
    with pytest.raises(AdapterMissing):
        await ask(client, "a")
    assert double.lives == 2


async def test_one_that_drains_serves_what_runs_and_aborts_what_comes(
    autojump_clock: MockClock, client: VllmClient, double: VllmDouble, tmp_path: Path
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: ask(client, **LONG))
        await trio.sleep(0.1)
        double.drain()
        assert await client.health()
        await gone(client, "abort")
        with pytest.raises(Unsent, match="Server shutting down"):
            await client.load_adapter("a", str(adapter(tmp_path, "a")))
    assert len(double.answered) == 1
    assert not await client.health()


async def test_one_that_hangs_answers_nothing(
    autojump_clock: MockClock, client: VllmClient, double: VllmDouble
) -> None:
    double.hang()
    began = trio.current_time()
    await gone(client, "does not answer")
    assert trio.current_time() - began >= COMPLETION_SECONDS
    with pytest.raises(Silent):
        await client.health()
    double.recover()
    await ask(client)


async def test_one_that_is_frozen_answers_that_it_runs_and_generates_nothing(
    autojump_clock: MockClock, client: VllmClient, double: VllmDouble
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: ask(client, **LONG))
        await trio.sleep(0.5)
        double.freeze()
        first = await client.load()
        await trio.sleep(10)
        second = await client.load()
        assert first.running == second.running == 1
        assert 0 < first.generated == second.generated < 200
        double.recover()


async def test_its_load_grows_with_every_token(autojump_clock: MockClock, client: VllmClient) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: ask(client, **LONG))
        await trio.sleep(0.5)
        first = await client.load()
        await trio.sleep(0.5)
        assert (await client.load()).generated - first.generated == pytest.approx(50, abs=2)


async def test_one_that_is_slow_takes_longer(
    autojump_clock: MockClock, client: VllmClient, double: VllmDouble
) -> None:
    took = []
    for slowness in (1.0, 10.0):
        double.slowness = slowness
        began = trio.current_time()
        await ask(client)
        took.append(trio.current_time() - began)
    assert took[1] == pytest.approx(10 * took[0])


async def test_one_that_refuses_loads_says_why(
    autojump_clock: MockClock, client: VllmClient, double: VllmDouble, tmp_path: Path
) -> None:
    path = str(adapter(tmp_path, "a"))
    double.refuses_loads = "CUDA out of memory"
    with pytest.raises(ReplicaRefused, match="'a': CUDA out of memory"):
        await client.load_adapter("a", path)
    double.refuses_loads = ""
    await client.load_adapter("a", path)


async def test_one_whose_adapter_has_lost_its_files_dies_and_takes_the_others_with_it(
    autojump_clock: MockClock, client: VllmClient, double: VllmDouble, tmp_path: Path
) -> None:
    """Not while it holds the weights: once they were pushed out by others."""
    for number in range(9):
        await client.load_adapter(f"a{number}", str(adapter(tmp_path, f"a{number}")))
    shutil.rmtree(tmp_path / "a0")
    shutil.rmtree(tmp_path / "a8")
    await ask(client, "a8")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: gone(client, "EngineCore", **LONG))
        await trio.sleep(0.1)
        with pytest.raises(ReplicaGone, match="EngineCore"):
            await ask(client, "a0")
    assert not await client.health()


async def test_one_never_drops_an_adapter_that_is_in_use(
    autojump_clock: MockClock, client: VllmClient, tmp_path: Path
) -> None:
    path = adapter(tmp_path, "used")
    await client.load_adapter("used", str(path))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: ask(client, "used", **LONG))
        await trio.sleep(0.1)
        shutil.rmtree(path)
        for number in range(9):
            await client.load_adapter(f"a{number}", str(adapter(tmp_path, f"a{number}")))
        await ask(client, "used")


async def test_one_serves_old_weights_under_a_name_and_path_that_are_used_again(
    autojump_clock: MockClock, client: VllmClient, double: VllmDouble, tmp_path: Path
) -> None:
    path = adapter(tmp_path, "a")
    await client.load_adapter("a", str(path))
    old = await ask(client, "a")
    (path / "adapter_model.safetensors").write_text("new weights")
    await client.unload_adapter("a")
    await client.load_adapter("a", str(path))
    assert await ask(client, "a") == old
    assert double.would_answer(asking(), path) != old.body
    # With a new name they are the new ones.
    await client.load_adapter("a@2", str(path))
    assert (await ask(client, "a@2")).body == double.would_answer(asking(), path)


async def test_an_adapter_without_a_place_waits_while_others_pass(
    autojump_clock: MockClock, client: VllmClient, double: VllmDouble, tmp_path: Path
) -> None:
    for number in range(5):
        await client.load_adapter(f"a{number}", str(adapter(tmp_path, f"a{number}")))
    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(lambda n=number: ask(client, f"a{n}", **LONG))
        await trio.sleep(0.1)
        nursery.start_soon(lambda: ask(client, "a4"))
        await trio.sleep(0.1)
        await ask(client, "a0")
        await ask(client)
        load = await client.load()
        assert (load.running, load.waiting) == (4, 1)
    assert [answered.model for answered in double.answered][-1] == "a4"


async def test_one_whose_model_has_diverged_says_so(
    autojump_clock: MockClock, client: VllmClient, double: VllmDouble, tmp_path: Path
) -> None:
    path = str(adapter(tmp_path, "a"))
    await client.load_adapter("a", path)
    double.diverged.add(path)
    with pytest.raises(UserError, match="not finite"):
        await ask(client, "a")
    await ask(client)
