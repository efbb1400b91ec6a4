"""`PUT /api`, over HTTP: what Megatron-LM's text generation server answers, by this server's model."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import trio
from trainer_kit import CREATE, floats, ints, sampled, train

from tests.hosted import hosted
from tink.http_server import App
from tink.limits import SAMPLE_SLOTS
from tink.pretrained import Text
from tink.trainer.engines.interface import Engine
from tink.trainer.engines.lora_engine import LoraEngine
from tink.trainer.server import application
from tink.trainer.trainer import Trainer
from tink.wire.tink_train import ExportAdapter, SampleRequest
from tink.world import World

PROMPT = "Return the 3 thing"


@asynccontextmanager
async def serving(engine: Engine, token: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """The server on a socket of this machine."""

    async def make(nursery: trio.Nursery) -> App:
        trainer = Trainer(World(), 4, nursery)
        await trainer.load(lambda: engine)
        return application(trainer, token)

    with hosted(make) as host:
        async with httpx.AsyncClient(base_url=host.url, timeout=60) as client:
            yield client


@pytest.fixture
async def client(engine: LoraEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(engine) as client:
        yield client


@pytest.fixture(scope="module")
def text(model_dir: Path) -> Text:
    return Text.load(model_dir)


async def put(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await client.put("/api", json=fields)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


def drawn(engine: LoraEngine, prompt: list[int], **fields: Any) -> tuple[list[int], list[float]]:
    """By the engine itself: tokens, and log-probabilities of all but the first."""
    request = SampleRequest("s", prompt, **{"seed": 0, "prompt_logprobs": True} | fields)
    response = sampled(engine.sample(request).body)
    (sequence,) = response.sequences
    scored = [*floats(response.prompt_logprobs)[1:], *floats(sequence.logprobs)]
    return prompt + ints(sequence.tokens), scored


# -- answers --------------------------------------------------------------------------------------


async def test_the_answer_is_the_engines_sample_as_text(
    client: httpx.AsyncClient, engine: LoraEngine, text: Text
) -> None:
    prompts = [PROMPT, "Grüße, 世界", "<|im_start|>user\n"]
    answer = await put(
        client,
        prompts=prompts,
        tokens_to_generate=9,
        logprobs=True,
        random_seed=5,
        top_k=20,
        temperature=0.7,
    )
    assert set(answer) == {"text", "tokens", "logprobs", "segments"}
    for place, prompt in enumerate(prompts):
        tokens, logprobs = drawn(
            engine, text.encode(prompt), seed=5 + place, max_tokens=9, top_k=20, temperature=0.7
        )
        assert answer["tokens"][place] == tokens
        assert answer["text"][place] == text.decode(tokens)
        assert answer["text"][place].startswith(prompt)
        assert "".join(answer["segments"][place]) == answer["text"][place]
        assert len(answer["segments"][place]) == len(tokens)
        np.testing.assert_allclose(answer["logprobs"][place], logprobs, atol=1e-6)
        assert len(logprobs) == len(tokens) - 1


async def test_what_is_left_out_has_megatrons_defaults(client: httpx.AsyncClient, text: Text) -> None:
    answer = await put(client, prompts=[PROMPT])
    assert set(answer) == {"text", "tokens", "segments"}
    (tokens,) = answer["tokens"]
    ended = tokens[-1] in text.eos
    assert len(tokens) - len(text.encode(PROMPT)) == 64 or ended


async def test_a_prompt_is_scored_without_a_continuation(
    client: httpx.AsyncClient, engine: LoraEngine, text: Text
) -> None:
    answer = await put(client, prompts=[PROMPT], tokens_to_generate=0, logprobs=True)
    tokens, logprobs = drawn(engine, text.encode(PROMPT), max_tokens=0)
    assert answer["tokens"] == [tokens] == [text.encode(PROMPT)]
    np.testing.assert_allclose(answer["logprobs"][0], logprobs, atol=1e-6)


async def test_equal_prompts_are_different_samples_and_a_seed_gives_them_again(
    client: httpx.AsyncClient,
) -> None:
    prompts = [PROMPT, "Raise", PROMPT, PROMPT]
    call = partial(put, client, prompts=prompts, tokens_to_generate=12, random_seed=3)
    first = await call()
    assert all(row.startswith(prompt) for row, prompt in zip(first["text"], prompts, strict=True))
    assert len(set(first["text"])) == len(prompts)
    assert await call() == first
    assert (await put(client, prompts=prompts, tokens_to_generate=12))["text"] != first["text"]


async def test_the_prompts_of_a_call_are_in_flight_together(
    client: httpx.AsyncClient, engine: LoraEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, going, most = engine.sample, set[str](), 0

    def counted(request: SampleRequest) -> Any:
        nonlocal most
        going.add(request.sample_id)
        most = max(most, len(going))
        try:
            return sample(request)
        finally:
            going.discard(request.sample_id)

    monkeypatch.setattr(engine, "sample", counted)
    prompts = [f"{number} things" for number in range(128)]
    answer = await put(client, prompts=prompts, tokens_to_generate=2)
    assert all(row.startswith(prompt) for row, prompt in zip(answer["text"], prompts, strict=True))
    assert most == SAMPLE_SLOTS


async def test_a_saved_adapter_draws_by_its_path(
    client: httpx.AsyncClient, engine: LoraEngine, text: Text
) -> None:
    engine.create("m", CREATE)
    train(engine, "m")
    engine.export_adapter("m", ExportAdapter("adapters/m"), "test")
    fields = {"prompts": [PROMPT], "tokens_to_generate": 4, "top_k": 1, "logprobs": True}
    tuned = await put(client, **fields, adapter="adapters/m")
    _, logprobs = drawn(engine, text.encode(PROMPT), max_tokens=4, temperature=0.0, adapter="adapters/m")
    np.testing.assert_allclose(tuned["logprobs"][0], logprobs, atol=1e-6)
    assert tuned["logprobs"] != (await put(client, **fields))["logprobs"]


async def test_the_ends_that_a_call_names_end_its_samples(client: httpx.AsyncClient, text: Text) -> None:
    begin = text.encode(PROMPT)
    free = (await put(client, prompts=[PROMPT], tokens_to_generate=40, random_seed=1))["tokens"][0]
    stop = free[len(begin) + 5]
    cut = await put(client, prompts=[PROMPT], tokens_to_generate=40, random_seed=1, stop_token=stop)
    assert cut["tokens"][0] == free[: len(begin) + free[len(begin) :].index(stop) + 1]
    line = await put(client, prompts=[PROMPT] * 16, tokens_to_generate=80, random_seed=1, stop_on_eol=True)
    ends = [row.removeprefix(PROMPT) for row in line["text"]]
    assert any("\n" in end for end in ends)
    assert all("\n" not in end or end.index("\n") >= len(end) - 2 for end in ends)


async def test_add_bos_begins_a_prompt_once(client: httpx.AsyncClient, text: Text) -> None:
    answer = await put(client, prompts=["", PROMPT], tokens_to_generate=1, add_BOS=True)
    assert answer["tokens"][0][0] == text.bos
    assert answer["tokens"][1][:-1] == [text.bos, *text.encode(PROMPT)]


# -- refusals -------------------------------------------------------------------------------------

WRONG: list[tuple[Any, str]] = [
    ({}, "prompts argument required"),
    ({"max_len": 3}, "prompts argument required"),
    ({"prompts": ["a"], "max_len": 3}, "max_len is no longer used.  Replace with tokens_to_generate"),
    ({"prompts": ["a"], "sentences": ["a"]}, "sentences is no longer used.  Replace with prompts"),
    ({"prompts": ["a"], "beam_width": 2}, "Beam search is no longer supported."),
    ({"prompts": "a"}, "prompts is not a list of strings"),
    ({"prompts": ["a", 1]}, "prompts is not a list of strings"),
    ({"prompts": []}, "prompts is empty"),
    ({"prompts": ["a"] * 129}, "Maximum number of prompts is 128"),
    ({"prompts": [""]}, "Empty prompts require add_BOS=true"),
    ({"prompts": ["a"], "tokens_to_generate": 0}, "tokens_to_generate=0 implies logprobs"),
    ({"prompts": ["a"], "temperature": 0}, "temperature must be a positive number"),
    ({"prompts": ["a"], "temperature": 100.5}, "temperature must be a positive number"),
    ({"prompts": ["a"], "top_k": 1001}, "top_k must be equal to or greater than 0"),
    ({"prompts": ["a"], "top_p": 1.5}, "top_p must be a positive float less than or equal to 1.0"),
    ({"prompts": ["a"], "top_p": 0.5, "top_k": 3}, "cannot set both top-k and top-p samplings."),
    ({"prompts": ["a"], "top_p": 0.5, "top_p_decay": 0.1}, "top_p_decay is not supported"),
    ({"prompts": ["a"], "top_p": 0.5, "top_p_bound": 0.1}, "top_p_bound is not supported"),
    ({"prompts": ["a"], "prevent_newline_after_colon": True}, "prevent_newline_after_colon is not supp"),
    ({"prompts": ["a"], "adapter": 3}, "adapter must be the path"),
    ({"prompts": ["a"], "adapter": "../../etc"}, "../../etc"),
    ({"prompts": ["a"], "adapter": "adapters/none"}, "adapters/none"),
    ({"prompts": ["a"], "stop_token": 10**6}, "stop has token id 1000000"),
    ({"prompts": ["a " * 400]}, "the prompt has"),
    *[
        ({"prompts": ["a"], name: value}, f"{name} must be")
        for name, values in {
            "tokens_to_generate": ["3", 1.5, -1, True, None, 2**70],
            "top_k": ["3", 1.5, -1, True],
            "random_seed": ["3", 1.5, -1],
            "stop_token": ["x", 0.5],
            "temperature": ["1", None, [1], True],
            "top_p": ["1", {}, -0.1],
            "length_penalty": ["1"],
            "logprobs": [1, "true"],
            "add_BOS": [0],
            "no_log": ["no"],
            "stop_on_eol": [1],
            "stop_on_double_eol": [1],
        }.items()
        for value in values
    ],
]
UNREADABLE = [b"{", b"[]", b"\xff", b'"prompts"', b"[" * 5000, b'{"prompts": ["\\ud800"]}']


async def test_what_is_wrong_is_named_and_nothing_is_drawn(
    client: httpx.AsyncClient, engine: LoraEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fields, complaint in WRONG:
        answer = await client.put("/api", json=fields)
        assert answer.status_code == 400, fields
        assert complaint in answer.json(), fields
    monkeypatch.delattr(engine.__class__, "sample")
    for content in UNREADABLE:
        answer = await client.put("/api", content=content)
        assert answer.status_code == 400, content
        assert isinstance(answer.json(), str)
        assert "Traceback" not in answer.text
    assert (await client.put("/api")).json() == "prompts argument required"
    assert (await client.get("/api")).status_code == 405


async def test_a_number_that_json_cannot_have_is_refused(client: httpx.AsyncClient) -> None:
    for number in ("NaN", "Infinity", "1e999", "1" + "0" * 400):
        answer = await client.put("/api", content=f'{{"prompts": ["a"], "temperature": {number}}}')
        assert answer.status_code == 400, number
        assert isinstance(json.loads(answer.text), str)


async def test_a_failure_of_the_engine_is_told_and_is_no_traceback(
    client: httpx.AsyncClient, engine: LoraEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(request: SampleRequest) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(engine, "sample", fail)
    answer = await client.put("/api", json={"prompts": ["a", "b"]})
    assert answer.status_code == 502
    assert "no room" in answer.json()
    assert "Traceback" not in answer.text


async def test_a_server_with_a_token_wants_it_here_too(engine: LoraEngine) -> None:
    async with serving(engine, token="secret") as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            answer = await client.put("/api", json={"prompts": ["a"]}, headers=headers)
            assert (answer.status_code, answer.json()) == (401, "pass TINK_TRAINER_TOKEN as a bearer token")
        client.headers["Authorization"] = "Bearer secret"
        await put(client, prompts=["a"], tokens_to_generate=1)


# -- the text side of a model ---------------------------------------------------------------------


def test_pieces_are_the_whole_text_whatever_the_tokens(text: Text) -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        tokens = random.integers(0, text.vocab_size, 20).tolist()
        pieces = text.pieces(tokens)
        assert len(pieces) == len(tokens)
        assert "".join(pieces) == text.decode(tokens)
    whole = text.encode("Grüße, 世界 🙂 ok")
    assert all("\ufffd" not in piece for piece in text.pieces(whole))
    assert all(a or b for a, b in pairwise(text.pieces(text.encode("ok ok"))))
