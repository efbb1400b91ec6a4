"""vLLM and the training server give the same numbers, and the SDK gets the same fields from either."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.vllm.adapters import Adapters
from tests.vllm.server import CONTEXT, VllmReplica
from tink.backends.vllm import VllmClient
from tink.wire import tinker_pb2 as pb
from tink.wire.tink_train import SampleRequest
from tink.world import World

pytestmark = pytest.mark.slow

PROMPT = [int(token) for token in np.random.default_rng(0).integers(20, 1000, 100)]


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    made = Adapters(tiny_model, tmp_path_factory.mktemp("agreement"))
    made.make("rank 8", seed=1)
    made.make("rank 64", rank=64, seed=2)
    made.make("no unembed", seed=3, unembed=False)
    return made


@pytest.fixture
async def client(vllm_replica: VllmReplica) -> AsyncIterator[VllmClient]:
    async with VllmClient.connect(vllm_replica.url, World(), slots=4) as client:
        yield client


async def both(
    client: VllmClient, adapters: Adapters, adapter: str | None, **fields: Any
) -> list[pb.SampleResponse]:
    """What vLLM and what the training server answers to one request."""
    request = SampleRequest(
        **{"sample_id": "s", "prompt": PROMPT, "seed": 1, "max_tokens": 8, "adapter": adapter} | fields
    )
    model = adapter or "base"
    if adapter:
        await client.load_adapter(model, str(adapters.root / adapter))
    try:
        sampled = await client.sample(request, model=model, max_context=CONTEXT)
    finally:
        if adapter:
            await client.unload_adapter(model)
    return [pb.SampleResponse.FromString(sampled.body), adapters.sample(request)]


@pytest.mark.parametrize("adapter", [None, "rank 8", "rank 64", "no unembed"])
async def test_logprobs_agree_to_1e_4(client: VllmClient, adapters: Adapters, adapter: str | None) -> None:
    theirs, ours = await both(client, adapters, adapter, prompt_logprobs=True, temperature=0.0)
    for get in (lambda r: r.prompt_logprobs, lambda r: r.sequences[0].logprobs):
        np.testing.assert_allclose(
            np.frombuffer(get(theirs), "<f4"), np.frombuffer(get(ours), "<f4"), atol=1e-4
        )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt_logprobs": True},
        {"prompt_logprobs": True, "prompt_logprobs_last_n": 5, "topk_prompt_logprobs": 3},
        {"topk_prompt_logprobs": 3, "topk_sample_logprobs": 3},
        {"num_samples": 3, "topk_sample_logprobs": 1},
        {"max_tokens": 0, "num_samples": 2, "topk_sample_logprobs": 2},
        {"max_tokens": 1, "prompt": [7], "prompt_logprobs": True, "topk_prompt_logprobs": 2},
        {"stop_tokens": list(range(0, 1024, 17)), "max_tokens": 100},
        {"stop_strings": ["e", "a"], "max_tokens": 40, "ignore_eos": True},
    ],
)
async def test_a_client_cannot_tell_which_of_them_answered(
    client: VllmClient, adapters: Adapters, fields: dict[str, Any]
) -> None:
    """Greedy, where the two must agree in every field; of numbers to 1e-4."""
    theirs, ours = await both(client, adapters, "rank 8", temperature=0.0, **fields)
    assert [field.name for field, _ in theirs.ListFields()] == [
        field.name for field, _ in ours.ListFields()
    ]
    assert len(theirs.sequences) == len(ours.sequences)
    for mine, other in zip(theirs.sequences, ours.sequences, strict=True):
        assert (mine.tokens, mine.stop_reason) == (other.tokens, other.stop_reason)
        assert mine.HasField("logprobs") == other.HasField("logprobs")
        same(mine.logprobs, other.logprobs)
        assert mine.HasField("topk_sampled_logprobs") == other.HasField("topk_sampled_logprobs")
        same_top(mine.topk_sampled_logprobs, other.topk_sampled_logprobs)
    same(theirs.prompt_logprobs, ours.prompt_logprobs)
    same_top(theirs.topk_prompt_logprobs, ours.topk_prompt_logprobs)


def fields_of(response: pb.SampleResponse) -> list[str]:
    return [field.name for field, _ in response.ListFields()]


def same(mine: bytes, other: bytes) -> None:
    np.testing.assert_allclose(np.frombuffer(mine, "<f4"), np.frombuffer(other, "<f4"), atol=1e-4)


def same_top(mine: pb.TopkLogprobs, other: pb.TopkLogprobs) -> None:
    assert (mine.k, mine.length, mine.token_ids) == (other.k, other.length, other.token_ids)
    same(mine.logprobs, other.logprobs)


def test_vllm_still_says_what_was_recorded(vllm_python: Path) -> None:
    """So that the double says what a real one does, for what the contract tests do not do to the one that
    they share: draining, dying."""
    checked = subprocess.run(
        [sys.executable, "-m", "tests.vllm.record", "--check"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
