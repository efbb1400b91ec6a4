"""A sample as a call of vLLM's `POST /v1/completions`, and its answer as the SDK's SampleResponse.

The answer has the fields and the meaning of the HuggingFace engine's (tink/trainer/engines/sampler.py), so
that a client cannot tell which of the two sampled. Token ids go in and come out; text is never looked at.

Every sampling field is sent, for what is left out comes from the model's generation_config.json. What
vLLM cannot do is a UserError that names the SDK's field.

Sample i of a request with seed s draws from vLLM's seed s + i: the same request sent to vLLM by hand gives
the same tokens; and requests of several samples need seeds further apart than their number, or they share
some. Seeds are taken modulo SEEDS, which keeps all of them in vLLM's range (64 bits, and -1 is none there).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import msgspec

from tink.backends.replica import Aborted, ReplicaGone
from tink.domain import sampling
from tink.errors import UNREADABLE, UserError
from tink.limits import (
    MAX_NUM_SAMPLES,
)
from tink.wire import samples
from tink.wire import tinker_pb2 as pb
from tink.wire.samples import EMPTY, NO_LOGPROB, NO_TOKEN, Sampled
from tink.wire.tink_train import SampleRequest

T = TypeVar("T")

SEEDS = 2**63 - MAX_NUM_SAMPLES
# How vLLM writes minus infinity, which JSON has not.
NEVER = -9999.0


class Call(NamedTuple):
    """A body for `/v1/completions`. `model`: the name in it."""

    body: bytes
    model: str


def encode(request: SampleRequest, *, model: str, max_context: int) -> Call:
    """The call that serves `request` by `model` (the base model's name or an adapter's) on a server with so
    large a context. Raises UserError for what vLLM cannot do."""
    check(request, max_context)
    greedy = request.temperature == 0
    body: dict[str, Any] = {
        "model": model,
        "prompt": request.prompt,
        # Of greedy samples vLLM takes no more than one: `decode` makes up for it.
        "n": sampling.distinct(request),
        "max_tokens": sampling.most(request, max_context),
        "min_tokens": 0,
        "temperature": request.temperature,
        "top_p": 1.0 if greedy else request.top_p,
        "top_k": 0 if greedy or request.top_k < 0 else request.top_k,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": None,
        "seed": request.seed % SEEDS,
        "stop": request.stop_strings,
        "stop_token_ids": request.stop_tokens,
        "include_stop_str_in_output": False,
        "ignore_eos": request.ignore_eos,
        # A stop string may be a special token's text.
        "skip_special_tokens": False,
        "spaces_between_special_tokens": True,
        "logprobs": request.topk_sample_logprobs,
        "prompt_logprobs": request.topk_prompt_logprobs if request.scores_prompt else None,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "echo": False,
        "stream": False,
    }
    return Call(msgspec.json.encode(body), model)


def check(request: SampleRequest, max_context: int) -> None:
    """Raises UserError for what no server with so large a context can do."""
    length = len(request.prompt)
    if not 1 <= length < max_context:
        raise UserError(
            f"the prompt has {length} tokens; it must have 1 to {max_context - 1} here: vLLM's context "
            f"(--max-model-len) is {max_context} and must hold one more"
        )
    sampling.check(request, max_context)
    if request.targets is not None:
        raise UserError(f"target_prompt_logprobs {_UNSUPPORTED}")
    if request.prompt_alt_tokens_k:
        raise UserError(f"prompt_alt_tokens_k {_UNSUPPORTED}")


_UNSUPPORTED = "is not served by vLLM: leave it out, or sample where the model is trained (USE_VLLM=false)"


# -- the answer -------------------------------------------------------------------------------------


class _Logprobs(msgspec.Struct):
    token_logprobs: list[float]
    # Read only where it was asked for.
    top_logprobs: msgspec.Raw = msgspec.Raw(b"null")


class _Choice(msgspec.Struct):
    index: int
    token_ids: list[int]
    logprobs: _Logprobs
    finish_reason: str | None = None
    # Every choice has a copy of it; the first is read.
    prompt_logprobs: msgspec.Raw = msgspec.Raw(b"null")


class _Completion(msgspec.Struct):
    model: str
    choices: list[_Choice]


class _Scored(msgspec.Struct):
    logprob: float


_read_completion = msgspec.json.Decoder(_Completion).decode
_read_top = msgspec.json.Decoder(list[dict[str, float]]).decode
_read_prompt = msgspec.json.Decoder(list[dict[int, _Scored] | None]).decode


def decode(answer: bytes, request: SampleRequest, *, model: str) -> Sampled:
    """The answer to `request` by `model`. Raises ReplicaGone unless all of it was done, and by that model:
    vLLM's status is 200 for an aborted request too."""
    try:
        completion = _read_completion(answer)
        response = pb.SampleResponse()
        _check_complete(completion, request, model)
        if request.scores_prompt:
            _fill_prompt(response, request, _read_prompt(completion.choices[0].prompt_logprobs))
        ordered = sorted(completion.choices, key=lambda choice: choice.index)
        sequences = [_sequence(choice, request) for choice in ordered]
    except (*UNREADABLE, LookupError, ValueError) as error:
        raise ReplicaGone(f"the sampling server's answer is not vLLM's: {_line(error)}") from error
    response.sequences.extend(sequences * (request.num_samples // len(sequences)))
    return Sampled.of(response, request.prompt)


def _check_complete(completion: _Completion, request: SampleRequest, model: str) -> None:
    if completion.model != model:
        raise ReplicaGone(f"the sampling server answered by {completion.model!r}: {model!r} was asked")
    wanted = sampling.distinct(request)
    if sorted(choice.index for choice in completion.choices) != list(range(wanted)):
        raise ReplicaGone(f"the sampling server gave {len(completion.choices)} samples of {wanted}")
    for choice in completion.choices:
        if choice.finish_reason not in ("stop", "length"):
            raise Aborted(f"the sampling server ended a sample as {choice.finish_reason!r}")
        if not choice.token_ids or len(choice.logprobs.token_logprobs) != len(choice.token_ids):
            raise ReplicaGone("the sampling server's answer lacks tokens or their logprobs")


def _sequence(choice: _Choice, request: SampleRequest) -> pb.SampledSequence:
    if request.max_tokens == 0:
        return EMPTY
    logprobs = [_logprob(value) for value in choice.logprobs.token_logprobs]
    message = samples.sequence(choice.token_ids, logprobs, stopped=choice.finish_reason == "stop")
    if k := request.topk_sample_logprobs:
        steps = _read_top(choice.logprobs.top_logprobs)
        if len(steps) != len(choice.token_ids):
            raise ReplicaGone("the sampling server's answer lacks the likeliest tokens")
        rows = [_likeliest(step, k, _token_id) for step in steps]
        message.topk_sampled_logprobs.CopyFrom(_topk(rows, k))
    return message


def _fill_prompt(
    response: pb.SampleResponse, request: SampleRequest, found: list[dict[int, _Scored] | None]
) -> None:
    """Position i is scored after the tokens before it; those before the last n asked for are left empty."""
    length = len(request.prompt)
    if len(found) != length:
        raise ReplicaGone(f"the sampling server scored {len(found)} tokens of a prompt of {length}")
    last = request.prompt_logprobs_last_n
    first = 1 if last is None else length - last
    scored = [
        {token: entry.logprob for token, entry in (entries or {}).items()} if place >= first else None
        for place, entries in enumerate(found)
    ]
    if request.prompt_logprobs:
        own = [
            math.nan if values is None else _logprob(values[token])
            for token, values in zip(request.prompt, scored, strict=True)
        ]
        response.prompt_logprobs = samples.floats(own)
    if k := request.topk_prompt_logprobs:
        rows = [[] if values is None else _likeliest(values, k, int) for values in scored]
        response.topk_prompt_logprobs.CopyFrom(_topk(rows, k))


def _likeliest(values: dict[T, float], k: int, token_id: Callable[[T], int]) -> list[tuple[int, float]]:
    """(token, logprob) of the k likeliest, likeliest first. vLLM gives these, and the token that stands
    there, which is one more if it is none of them."""
    pairs = sorted(values.items(), key=lambda pair: -pair[1])
    return [(token_id(key), _logprob(value)) for key, value in pairs[:k]]


def _token_id(text: str) -> int:
    return int(text.removeprefix("token_id:"))


def _topk(rows: list[list[tuple[int, float]]], k: int) -> pb.TopkLogprobs:
    cells = [cell for row in rows for cell in row + [(NO_TOKEN, NO_LOGPROB)] * (k - len(row))]
    return pb.TopkLogprobs(
        token_ids=samples.ints([token for token, _ in cells]),
        logprobs=samples.floats([value for _, value in cells]),
        k=k,
        length=len(rows),
    )


def _logprob(value: float) -> float:
    return -math.inf if value <= NEVER else value


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
