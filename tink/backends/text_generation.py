"""Megatron-LM's text generation server as it is (`PUT /api`): to the worker a training server that only
samples, and that by the base model alone.

It takes text and gives text. A prompt goes there as the text that its tokens are of, and what comes back
must begin with the same tokens; servers that give no tokens must give the text, piece by piece, of those
that we read it as. It generates up to the length that is asked for or to the model's end of a sequence,
which newer ones leave out of the answer; a sample is cut at the stops of its request here. The
log-probabilities are the model's own. A seed is passed on (as `random_seed`), which not all of them heed: a
request that names one is refused.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import msgspec

from tink import pretrained
from tink.backends.exchange import HttpAnswer, HttpClient, NoAnswer, exchange
from tink.backends.trainer import TrainerClient, TrainerGone
from tink.domain import sampling
from tink.errors import UNREADABLE, BackendError, StartupError, UserError
from tink.limits import (
    ANSWER_SECONDS,
    HEALTH_SECONDS,
    MAX_REASON,
    TEXT_GENERATION_CONTEXT,
    TOKEN_SECONDS,
)
from tink.pretrained import Text
from tink.wire import samples, tink_train
from tink.wire import tinker_pb2 as pb
from tink.wire.samples import EMPTY, Sampled
from tink.wire.text_generation import MAX_PROMPTS, MAX_TEMPERATURE, MAX_TOP_K, NO_PROMPTS, PATH, Answer
from tink.wire.tink_train import SampleReply, SampleRequest
from tink.world import World

ENGINE = "Megatron-LM text generation server"
# Numbers go through float32 there.
SEEDS = 2**24
_LACKS = "a plain Megatron-LM text generation server cannot serve: start `tink trainer` in its place"


async def recognised(url: str, world: World) -> bool:
    """Whether a plain one answers there. False also if nothing does, or not yet."""
    async with HttpClient.connect(url, world, slots=1) as client:
        try:
            health = await _exchange(client, "GET", "/v1/health", None, HEALTH_SECONDS)
            if health.status == 200 and "protocol" in _fields(health.content):
                return False
            return await _complains(client)
        except NoAnswer:
            return False


def load(model: str) -> Text:
    """The text side of a model that is named by its directory or on the hub. Blocks. StartupError."""
    text = Text.load(pretrained.find(model, pretrained.TEXT_FILES))
    if not text.context:
        raise StartupError(f"{text.path / 'config.json'} does not say max_position_embeddings")
    return replace(text, context=min(text.context, TEXT_GENERATION_CONTEXT))


@asynccontextmanager
async def connect(
    url: str, world: World, *, slots: int, text: Text, name: str
) -> AsyncIterator[TextGenerationClient]:
    """`text`: the text side of the model that is there, `name` the one that clients use for it."""
    async with HttpClient.connect(url, world, slots=slots) as client:
        yield TextGenerationClient(client, url, world, text, name)


class TextGenerationClient(TrainerClient):
    """Calls of one server. What it does not have (operations, snapshots) must not be asked for. Cancelled,
    a sample goes on there to its end."""

    def __init__(self, client: HttpClient, url: str, world: World, text: Text, name: str) -> None:
        super().__init__(client, url)
        self._world, self._text, self._name = world, text, name
        # It has no name for its life: one for each connection, and for each call that was lost.
        self._incarnation = world.new_id()

    async def health(self) -> tink_train.Health:
        try:
            if not await _complains(self._client):
                raise TrainerGone(f"what answers at {self.url} is no {ENGINE} any more")
        except NoAnswer as error:
            raise self._lost(error) from error
        return tink_train.Health(tink_train.PROTOCOL, self._incarnation, "ready")

    async def info(self) -> tink_train.Info:
        return tink_train.Info(
            protocol=tink_train.PROTOCOL,
            incarnation=self._incarnation,
            engine=ENGINE,
            versions={},
            base_model=self._name,
            base_path=str(self._text.path),
            base_digest="unknown",
            arch=self._text.arch,
            parameters=0,
            vocab_size=self._text.vocab_size,
            max_context=self._text.context,
            max_rank=0,
            losses=[],
            capabilities=["sample"],
        )

    async def state(self) -> tink_train.State:
        return tink_train.State(self._incarnation, 0, {})

    async def sample(self, request: SampleRequest) -> SampleReply:
        """Raises UserError for what it cannot do, BackendError when it fails over the request, TrainerGone
        when it is lost."""
        began = self._world.monotonic()
        check(request, self._text.context)
        prompt = await self._world.run_sync(self._text.spell, request.prompt)
        most, count = sampling.most(request, self._text.context), sampling.distinct(request)
        rows: list[tuple[list[int], list[float]]] = []
        while len(rows) < count:
            number = min(count - len(rows), MAX_PROMPTS)
            body = _encode(request, prompt, number, most, request.seed + len(rows))
            answer = await self._put(body, ANSWER_SECONDS + most * TOKEN_SECONDS)
            rows += await self._world.run_sync(self._rows, request, prompt, answer, number)
        return await self._world.run_sync(self._reply, request, rows, most, began)

    async def _put(self, body: bytes, seconds: float) -> Answer:
        try:
            answer = await _exchange(self._client, "PUT", PATH, body, seconds)
        except NoAnswer as error:
            self._incarnation = self._world.new_id()
            raise self._lost(error) from error
        complaint = _complaint(answer.content)
        if complaint is not None and answer.status in (200, 400):
            raise UserError(f"the {ENGINE} at {self.url} refuses it: {complaint}")
        if answer.status in (502, 503, 504):
            self._incarnation = self._world.new_id()
            raise TrainerGone(f"the {ENGINE} at {self.url} answers {answer.status}")
        if answer.status != 200:
            reason = answer.content[:MAX_REASON].decode(errors="replace")
            raise BackendError(
                f"the {ENGINE} at {self.url} failed over it: {answer.status} {reason.strip()}; its log "
                "says why; if it fails over others too, restart it"
            )
        try:
            return msgspec.json.decode(answer.content, type=Answer)
        except UNREADABLE as error:
            raise self._odd(f"not an answer with text and numbers: {error}") from error

    def _lost(self, error: NoAnswer) -> TrainerGone:
        return TrainerGone(f"the {ENGINE} at {self.url} does not answer: {error}")

    def _odd(self, what: str) -> BackendError:
        return BackendError(f"the {ENGINE} at {self.url} gave {what}")

    def _rows(
        self, request: SampleRequest, prompt: str, answer: Answer, number: int
    ) -> list[tuple[list[int], list[float]]]:
        """Row by row: tokens, prompt included, and the log-probabilities of all but the first."""
        tokens = answer.tokens or [self._read(request, prompt, *row) for row in _texts(answer)]
        logprobs = answer.logprobs or []
        if len(tokens) != number or len(logprobs) != number:
            raise self._odd(
                f"{len(tokens)} samples and {len(logprobs)} rows of logprobs: {number} were asked"
            )
        begin = len(request.prompt)
        rows = []
        for row, scored in zip(tokens, logprobs, strict=True):
            if row[:begin] != request.prompt:
                raise BackendError(
                    f"the {ENGINE} at {self.url} read the prompt as other tokens: its tokenizer is not "
                    f"that of TINK_HF_MODEL ({self._text.path})"
                )
            values = [value for value in scored if value is not None]
            if len(values) != len(row) - 1:
                raise self._odd(f"{len(values)} logprobs for {len(row)} tokens")
            if not all(0 <= token < self._text.vocab_size for token in row):
                raise self._odd(f"a token id outside of its vocabulary of {self._text.vocab_size}")
            if not all(abs(value) < 1e30 for value in values):  # nor NaN
                raise self._odd("a log-probability that is none")
            rows.append((row, values))
        return rows

    def _read(self, request: SampleRequest, prompt: str, whole: str, pieces: list[str]) -> list[int]:
        """The tokens of a continuation that is told as text."""
        tokens = self._text.encode_part(whole.removeprefix(prompt))
        told = pieces[len(request.prompt) :]
        if not whole.startswith(prompt) or [self._text.decode([token]) for token in tokens] != told:
            raise self._odd("a text that does not tell its tokens: newer ones give them")
        return [*request.prompt, *tokens]

    def _reply(
        self, request: SampleRequest, rows: list[tuple[list[int], list[float]]], most: int, began: float
    ) -> SampleReply:
        begin = len(request.prompt)
        sequences = [
            self._sequence(request, row[begin:], scored[begin - 1 :], most) for row, scored in rows
        ]
        sequences *= request.num_samples // len(sequences)
        response = pb.SampleResponse(sequences=sequences)
        if request.prompt_logprobs:
            last = request.prompt_logprobs_last_n
            first = 1 if last is None else begin - last
            scored = [math.nan, *rows[0][1][: begin - 1]]
            own = [value if place >= first else math.nan for place, value in enumerate(scored)]
            response.prompt_logprobs = samples.floats(own)
        run_ms = (self._world.monotonic() - began) * 1000
        sampled = Sampled.of(response, request.prompt)
        return SampleReply("done", request.sample_id, *sampled, run_ms=run_ms)

    def _sequence(
        self, request: SampleRequest, tokens: list[int], logprobs: list[float], most: int
    ) -> pb.SampledSequence:
        if request.max_tokens == 0:
            return EMPTY
        tokens, logprobs = tokens[:most], logprobs[:most]
        end = self._end(request, tokens)
        stopped = end is not None or len(tokens) < most or tokens[-1] in self._text.eos
        return samples.sequence(tokens[:end], logprobs[:end], stopped=stopped)

    def _end(self, request: SampleRequest, tokens: list[int]) -> int | None:
        """How many tokens there are with the first stop, which stays part of the sample."""

        def stops(count: int) -> bool:
            shown = self._text.decode(tokens[:count])
            return any(stop in shown for stop in request.stop_strings)

        ends = [place + 1 for place, token in enumerate(tokens) if token in request.stop_tokens][:1]
        if request.stop_strings and stops(len(tokens)):
            ends.append(bisect_left(range(len(tokens) + 1), True, key=stops))
        return min(ends, default=None)


def check(request: SampleRequest, context: int) -> None:
    """Raises UserError for what such a server cannot do."""
    length = len(request.prompt)
    if not 1 <= length < context:
        raise UserError(f"the prompt has {length} tokens; it must have 1 to {context - 1}")
    if request.adapter is not None:
        raise UserError(f"this sampler has trained weights, which {_LACKS}")
    if request.seeded:
        raise UserError(f"seed: which tokens are drawn by it is what {_LACKS}, or leave it out")
    if request.ignore_eos:
        raise UserError(f"stop: an empty list, so that nothing ends a sample, is what {_LACKS}")
    for field in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k", "targets"):
        if getattr(request, field):
            raise UserError(f"{field}: this is what {_LACKS}")
    sampling.check(request, context)
    if not 0 <= request.temperature <= MAX_TEMPERATURE:
        raise UserError(f"temperature is {request.temperature}: it must be 0 to {MAX_TEMPERATURE} here")
    if not -1 <= request.top_k <= MAX_TOP_K:
        raise UserError(f"top_k is {request.top_k}: it must be -1 to {MAX_TOP_K} here")
    if request.temperature and request.top_k > 0 and request.top_p < 1:
        raise UserError(f"top_k and top_p together are what {_LACKS}, or leave one out")


def _encode(request: SampleRequest, prompt: str, number: int, most: int, seed: int) -> bytes:
    greedy = request.temperature == 0
    fields: dict[str, Any] = {
        "prompts": [prompt] * number,
        "tokens_to_generate": most,
        "logprobs": True,
        "temperature": 1.0 if greedy else float(request.temperature),
        "top_k": 1 if greedy else max(request.top_k, 0),
        "top_p": 0.0 if greedy or request.top_p == 1 else float(request.top_p),
        "random_seed": seed % SEEDS,
        "no_log": True,
    }
    return msgspec.json.encode(fields)


def _texts(answer: Answer) -> list[tuple[str, list[str]]]:
    segments = answer.segments or [[] for _ in answer.text]
    return list(zip(answer.text, segments, strict=False))


async def _exchange(
    client: HttpClient, method: str, path: str, content: bytes | None, seconds: float
) -> HttpAnswer:
    return await exchange(client, method, path, seconds=seconds, content=content, again=True)


async def _complains(client: HttpClient) -> bool:
    """As such a server does of a request without fields, busy or not. Raises NoAnswer."""
    answer = await _exchange(client, "PUT", PATH, b"{}", HEALTH_SECONDS)
    return _complaint(answer.content) == NO_PROMPTS


def _complaint(content: bytes) -> str | None:
    try:
        return msgspec.json.decode(content, type=str)
    except UNREADABLE:
        return None


def _fields(content: bytes) -> dict[str, object]:
    try:
        return msgspec.json.decode(content, type=dict[str, object])
    except UNREADABLE:
        return {}
