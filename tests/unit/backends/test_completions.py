"""What a SampleRequest becomes on the wire to vLLM, and what of its answers is believed."""

from __future__ import annotations

import math
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tink.backends.completions import SEEDS, decode, encode
from tink.backends.replica import ReplicaGone
from tink.errors import UserError
from tink.limits import MAX_NUM_SAMPLES
from tink.wire import tinker_pb2 as pb
from tink.wire.samples import NO_LOGPROB
from tink.wire.tink_train import SampleRequest

CONTEXT = 32


def asking(**fields: Any) -> SampleRequest:
    return SampleRequest(**{"sample_id": "s", "prompt": [5, 6, 7], "seed": 3, "max_tokens": 2} | fields)


def sent(**fields: Any) -> dict[str, Any]:
    return msgspec.json.decode(encode(asking(**fields), model="m@1", max_context=CONTEXT).body)


def choice(index: int = 0, **fields: Any) -> dict[str, Any]:
    tokens = fields.get("token_ids", [8, 9])
    logprobs = {
        "token_logprobs": [-1.0] * len(tokens),
        "top_logprobs": [{f"token_id:{token}": -1.0} for token in tokens],
    }
    plain = {"index": index, "token_ids": tokens, "logprobs": logprobs, "finish_reason": "length"}
    return plain | {"prompt_logprobs": None} | fields


def answer(*choices: dict[str, Any], model: str = "m@1") -> bytes:
    return msgspec.json.encode({"model": model, "choices": choices or [choice()]})


def read(content: bytes, **fields: Any) -> pb.SampleResponse:
    return pb.SampleResponse.FromString(decode(content, asking(**fields), model="m@1").body)


def floats(data: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def ints(data: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(data) // 4}i", data))


# -- the call ---------------------------------------------------------------------------------------


def test_every_sampling_field_is_sent() -> None:
    """vLLM takes what is left out from the model's generation_config.json."""
    assert sent(
        temperature=0.7, top_k=40, top_p=0.9, stop_strings=["."], stop_tokens=[2], num_samples=3
    ) == {
        "model": "m@1",
        "prompt": [5, 6, 7],
        "n": 3,
        "max_tokens": 2,
        "min_tokens": 0,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": None,
        "seed": 3,
        "stop": ["."],
        "stop_token_ids": [2],
        "include_stop_str_in_output": False,
        "ignore_eos": False,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": True,
        "logprobs": 0,
        "prompt_logprobs": None,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "echo": False,
        "stream": False,
    }


@pytest.mark.parametrize(
    ("prompt", "asked", "got"),
    [(3, None, 29), (3, 29, 29), (3, 30, 29), (3, 0, 1), (31, None, 1), (31, 500, 1), (1, 31, 31)],
)
def test_what_the_context_has_no_room_for_is_cut_here(prompt: int, asked: int | None, got: int) -> None:
    assert sent(prompt=[1] * prompt, max_tokens=asked)["max_tokens"] == got


def test_a_greedy_request_asks_for_one_sample_of_the_plain_distribution() -> None:
    body = sent(temperature=0.0, num_samples=8, top_k=3, top_p=0.5)
    assert (body["n"], body["top_k"], body["top_p"]) == (1, 0, 1.0)


@pytest.mark.parametrize(("asked", "got"), [(-1, 0), (0, 0), (1, 1), (50, 50)])
def test_top_k_is_off_as_vllm_says_it(asked: int, got: int) -> None:
    assert sent(top_k=asked)["top_k"] == got


@given(st.integers(-(2**63), 2**63 - 1))
def test_every_sample_has_a_seed_that_vllm_takes(seed: int) -> None:
    got = sent(seed=seed)["seed"]
    assert 0 <= got < got + MAX_NUM_SAMPLES - 1 < 2**63
    assert got == seed or not 0 <= seed < SEEDS


def test_the_prompts_logprobs_are_asked_for_only_when_they_are_wanted() -> None:
    assert sent()["prompt_logprobs"] is None
    assert sent(prompt_logprobs=True)["prompt_logprobs"] == 0
    assert sent(topk_prompt_logprobs=5)["prompt_logprobs"] == 5


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"targets": [[1], [2]]}, "target_prompt_logprobs"),
        ({"prompt_alt_tokens_k": 1}, "prompt_alt_tokens_k"),
        ({"prompt": []}, "prompt has 0 tokens"),
        ({"prompt": [1] * CONTEXT}, "--max-model-len"),
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": MAX_NUM_SAMPLES + 1}, "num_samples"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"top_k": -2}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"topk_prompt_logprobs": 65}, "topk_prompt_logprobs"),
        ({"topk_sample_logprobs": -1}, "topk_sample_logprobs"),
        ({"stop_strings": [""]}, "empty stop string"),
        ({"stop_tokens": [1] * 65}, "stops"),
        ({"prompt_logprobs_last_n": 1}, "needs prompt_logprobs"),
        ({"prompt_logprobs_last_n": 3, "prompt_logprobs": True}, "prompt_logprobs_last_n"),
    ],
)
def test_what_cannot_be_served_is_the_callers_error_and_names_the_field(
    fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        sent(**fields)


def test_more_logprobs_than_fit_an_answer_are_refused() -> None:
    request = asking(num_samples=1024, max_tokens=None, topk_sample_logprobs=64)
    with pytest.raises(UserError, match="topk_sample_logprobs"):
        encode(request, model="m", max_context=32_768)


# -- the answer -------------------------------------------------------------------------------------


def test_samples_come_back_in_order_with_ids_logprobs_and_the_reason() -> None:
    second = choice(1, token_ids=[4], finish_reason="stop")
    got = decode(answer(second, choice(0)), asking(num_samples=2), model="m@1")
    assert (got.tokens_in, got.tokens_out) == (3, 3)
    response = pb.SampleResponse.FromString(got.body)
    assert [ints(sequence.tokens) for sequence in response.sequences] == [[8, 9], [4]]
    assert [floats(sequence.logprobs) for sequence in response.sequences] == [[-1.0, -1.0], [-1.0]]
    reasons = [sequence.stop_reason for sequence in response.sequences]
    assert reasons == [pb.STOP_REASON_LENGTH, pb.STOP_REASON_STOP]
    assert not response.HasField("prompt_logprobs")
    assert not response.HasField("topk_prompt_logprobs")
    assert not response.sequences[0].HasField("topk_sampled_logprobs")


def test_a_greedy_sample_is_repeated_as_often_as_it_was_asked_for() -> None:
    got = decode(answer(), asking(temperature=0.0, num_samples=3), model="m@1")
    assert got.tokens_out == 6
    sequences = pb.SampleResponse.FromString(got.body).sequences
    assert [ints(sequence.tokens) for sequence in sequences] == [[8, 9]] * 3


def test_no_tokens_are_no_tokens() -> None:
    got = decode(answer(choice(token_ids=[8])), asking(max_tokens=0, num_samples=2), model="m@1")
    assert got.tokens_out == 0
    for sequence in pb.SampleResponse.FromString(got.body).sequences:
        assert (sequence.tokens, sequence.logprobs) == (b"", b"")
        assert sequence.HasField("logprobs")
        assert sequence.stop_reason == pb.STOP_REASON_LENGTH


def test_the_likeliest_tokens_are_ordered_and_without_the_sampled_one_if_it_is_none_of_them() -> None:
    top = [
        {"token_id:8": -9.0, "token_id:1": -0.5, "token_id:2": -0.7},
        {"token_id:9": -0.6, "token_id:3": -0.4},
    ]
    logprobs = {"token_logprobs": [-9.0, -0.6], "top_logprobs": top}
    (sequence,) = read(answer(choice(logprobs=logprobs)), topk_sample_logprobs=2).sequences
    found = sequence.topk_sampled_logprobs
    assert (found.k, found.length, ints(found.token_ids)) == (2, 2, [1, 2, 3, 9])
    assert floats(found.logprobs) == pytest.approx([-0.5, -0.7, -0.4, -0.6])


PROMPT_LOGPROBS = [
    None,
    {"6": {"logprob": -7.0, "rank": 900}, "1": {"logprob": -1.0, "rank": 1}},
    {"7": {"logprob": -0.5, "rank": 1}},
]


def test_the_prompts_logprobs_have_no_first() -> None:
    content = answer(choice(prompt_logprobs=PROMPT_LOGPROBS))
    found = floats(read(content, prompt_logprobs=True).prompt_logprobs)
    assert math.isnan(found[0])
    assert found[1:] == [-7.0, -0.5]
    assert not read(content, prompt_logprobs=True).HasField("topk_prompt_logprobs")


def test_only_the_last_n_are_given_when_asked() -> None:
    response = read(
        answer(choice(prompt_logprobs=PROMPT_LOGPROBS)),
        prompt_logprobs=True,
        topk_prompt_logprobs=1,
        prompt_logprobs_last_n=1,
    )
    found = floats(response.prompt_logprobs)
    assert [math.isnan(value) for value in found] == [True, True, False]
    assert ints(response.topk_prompt_logprobs.token_ids) == [0, 0, 7]


def test_the_likeliest_tokens_of_the_prompt_are_without_its_own_if_that_is_none_of_them() -> None:
    response = read(answer(choice(prompt_logprobs=PROMPT_LOGPROBS)), topk_prompt_logprobs=1)
    found = response.topk_prompt_logprobs
    assert (found.k, found.length, ints(found.token_ids)) == (1, 3, [0, 1, 7])
    assert floats(found.logprobs) == [NO_LOGPROB, -1.0, -0.5]
    assert not response.HasField("prompt_logprobs")


def test_minus_9999_is_minus_infinity() -> None:
    logprobs = {"token_logprobs": [-9999.0, -1.0]}
    (sequence,) = read(answer(choice(logprobs=logprobs))).sequences
    assert floats(sequence.logprobs) == [-math.inf, -1.0]


TWO = {"num_samples": 2}
PROMPT = {"prompt_logprobs": True}
TOP = {"topk_sample_logprobs": 1}
INCOMPLETE: dict[str, tuple[bytes, dict[str, Any]]] = {
    "aborted": (answer(choice(finish_reason="abort")), {}),
    "aborted with nothing": (answer(choice(finish_reason="abort", token_ids=[])), {}),
    "one of two aborted": (answer(choice(0), choice(1, finish_reason="abort")), TWO),
    "no reason": (answer(choice(finish_reason=None)), {}),
    "a reason of tomorrow": (answer(choice(finish_reason="repetition")), {}),
    "too few": (answer(), TWO),
    "too many": (answer(choice(0), choice(1)), {}),
    "the same twice": (answer(choice(0), choice(0)), TWO),
    "no choices": (msgspec.json.encode({"model": "m@1", "choices": []}), {}),
    "another model": (answer(model="base"), {}),
    "no tokens": (answer(choice(token_ids=[])), {}),
    "too few logprobs": (answer(choice(logprobs={"token_logprobs": [-1.0]})), {}),
    "no logprobs": (answer(choice(logprobs=None)), {}),
    "not a number": (answer(choice(logprobs={"token_logprobs": [None, -1.0]})), {}),
    "no likeliest": (answer(choice(logprobs={"token_logprobs": [-1.0, -1.0]})), TOP),
    "text for ids": (
        answer(choice(logprobs={"token_logprobs": [-1, -1], "top_logprobs": [{"a": -1}, {"b": -1}]})),
        TOP,
    ),
    "no prompt logprobs": (answer(), PROMPT),
    "too few prompt logprobs": (answer(choice(prompt_logprobs=PROMPT_LOGPROBS[:2])), PROMPT),
    "prompt logprobs of another prompt": (
        answer(choice(prompt_logprobs=[None, {"1": {"logprob": -1}}, {"2": {"logprob": -1}}])),
        PROMPT,
    ),
    "an id that is none": (answer(choice(token_ids=[2**40, 1])), {}),
    "half": (answer()[:40], {}),
    "nothing": (b"", {}),
    "not UTF-8": (b'{"model":"\xff","choices":[]}', {}),
    "deep": (b'{"model":' + b"[" * 100_000, {}),
}


@pytest.mark.parametrize("what", INCOMPLETE)
def test_an_answer_that_is_not_whole_is_no_answer(what: str) -> None:
    """With status 200, each of them."""
    content, fields = INCOMPLETE[what]
    with pytest.raises(ReplicaGone):
        decode(content, asking(**fields), model="m@1")
