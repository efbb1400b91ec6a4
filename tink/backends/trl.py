"""One `trl vllm-serve` before 1.11: a server of TRL's own around vLLM, for the base model alone.

It has no adapters and no list of models, and does not say why a sample ended. Its logprobs are those of the
distribution that it drew from. It serves one request after another and answers nothing meanwhile, health
included, so the calls of a client queue here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import trio

from tink.backends import completions
from tink.backends.exchange import HttpAnswer, HttpClient
from tink.backends.replica import ReplicaGone, ReplicaRefused, Silent, ask
from tink.domain import sampling
from tink.errors import UNREADABLE, UserError
from tink.limits import ANSWER_SECONDS, HEALTH_SECONDS, MAX_REASON, TOKEN_SECONDS
from tink.wire import samples
from tink.wire import tinker_pb2 as pb
from tink.wire.samples import EMPTY, Sampled
from tink.wire.tink_train import SampleRequest
from tink.world import World

# What a caller takes a server's to be who does not know it.
UNKNOWN_CONTEXT = 2**31
# vLLM refuses more, and this server hangs for ever after any such refusal.
MAX_TEMPERATURE = 2.0


class _Generated(msgspec.Struct):
    """Sequence by sequence; the last two have a list of the likeliest for each token, here only its own."""

    completion_ids: list[list[int]]
    logprobs: list[list[list[float | None]]]
    logprob_token_ids: list[list[list[int]]]


class TrlClient:
    """Calls of one server. It runs one at a time: whoever samples holds `turn`. Errors and cancellation as
    in VllmClient."""

    def __init__(self, client: HttpClient, url: str) -> None:
        self._client, self.url = client, url
        self.turn = trio.CapacityLimiter(1)
        self._hangs = False

    @classmethod
    @asynccontextmanager
    async def connect(cls, url: str, world: World) -> AsyncIterator[TrlClient]:
        # Two: a look beside the call.
        async with HttpClient.connect(url, world, slots=2) as client:
            yield cls(client, url)

    async def health(self) -> bool:
        """Whether it answers. One that computes for this client cannot, and is taken to be well, unless it
        has been late once."""
        if self.turn.borrowed_tokens and not self._hangs:
            return True
        try:
            well = (await self._exchange("GET", "/health/", HEALTH_SECONDS)).status == 200
        except ReplicaGone:
            return False
        self._hangs = self._hangs and not well
        return well

    async def sample(self, request: SampleRequest, *, max_context: int) -> Sampled:
        """By the base model. Raises UserError for what this server cannot do. It does not tell how large a
        context it has, and a prompt that is longer makes it hang for ever: pass what is known."""
        body = encode(request, max_context)
        seconds = ANSWER_SECONDS + (_longest(request, max_context) or 0) * TOKEN_SECONDS
        try:
            answer = await self._exchange("POST", "/generate/", seconds, body)
        except Silent:
            self._hangs = True
            raise
        if answer.status != 200:
            reason = answer.content[:MAX_REASON].decode(errors="replace")
            raise ReplicaGone(f"the TRL server at {self.url} failed: {answer.status} {reason}")
        try:
            return decode(answer.content, request, max_context)
        except (*UNREADABLE, LookupError, ValueError) as error:
            raise ReplicaRefused(
                f"the TRL server at {self.url} does not answer as TRL 1.0 to 1.10 do: use `vllm serve`"
            ) from error

    async def _exchange(
        self, method: str, path: str, seconds: float, content: bytes | None = None
    ) -> HttpAnswer:
        server = f"the TRL server at {self.url}"
        return await ask(self._client, server, method, path, seconds=seconds, content=content)


def encode(request: SampleRequest, max_context: int) -> bytes:
    """The body for `/generate/`."""
    completions.check(request, max_context)
    if request.temperature > MAX_TEMPERATURE:
        raise UserError(f"temperature is {request.temperature}: it must be {MAX_TEMPERATURE} or less")
    if request.adapter is not None:
        raise UserError(f"this sampler has trained weights, which {_LACKS}")
    for field in ("prompt_logprobs", "topk_prompt_logprobs", "topk_sample_logprobs"):
        if getattr(request, field):
            raise UserError(f"{field}: {_LACKS}")
    body: dict[str, Any] = {
        "prompts": [request.prompt],
        "n": sampling.distinct(request),
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "logprobs": 0,
        # Any field of vLLM's SamplingParams.
        "generation_kwargs": {
            "max_tokens": _longest(request, max_context),
            "seed": request.seed % completions.SEEDS,
            "stop": request.stop_strings,
            "stop_token_ids": request.stop_tokens,
            "ignore_eos": request.ignore_eos,
            "skip_special_tokens": False,
        },
    }
    return msgspec.json.encode(body)


_LACKS = "an old trl vllm-serve cannot serve: start vLLM itself (`vllm serve`), or TRL 1.11 or later"


def decode(answer: bytes, request: SampleRequest, max_context: int) -> Sampled:
    """What stops a sample is not told: one that is shorter than it may be, or ends on one of the request's
    stop tokens, has been stopped."""
    found = msgspec.json.decode(answer, type=_Generated)
    if len(found.completion_ids) != sampling.distinct(request):
        raise ReplicaGone(f"the TRL server gave {len(found.completion_ids)} samples")
    each = zip(found.completion_ids, found.logprobs, found.logprob_token_ids, strict=True)
    longest = _longest(request, max_context)
    sequences = [_sequence(request, longest, *parts) for parts in each]
    sequences *= request.num_samples // len(sequences)
    return Sampled.of(pb.SampleResponse(sequences=sequences), request.prompt)


def _longest(request: SampleRequest, max_context: int) -> int | None:
    """How many tokens a sample may have; None where only the server knows it."""
    if request.max_tokens is None and max_context == UNKNOWN_CONTEXT:
        return None
    return sampling.most(request, max_context)


def _sequence(
    request: SampleRequest,
    longest: int | None,
    tokens: list[int],
    logprobs: list[list[float | None]],
    ids: list[list[int]],
) -> pb.SampledSequence:
    if request.max_tokens == 0:
        return EMPTY
    if not tokens or [step[0] for step in ids] != tokens:
        raise ValueError("the logprobs are not those of the tokens")
    stopped = tokens[-1] in request.stop_tokens or longest is None or len(tokens) < longest
    own = [-float("inf") if step[0] is None else step[0] for step in logprobs]
    return samples.sequence(tokens, own, stopped=stopped)
