"""`PUT /api`: text in, text out, as Megatron-LM's text generation server has it, for its clients. The
prompts of a call are all in flight at once, equal ones together, through the same slots as any sample."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import trio

from tink.errors import UNREADABLE, MalformedRequest, TinkError, UserError, failed
from tink.limits import MAX_OP_WAIT
from tink.pretrained import Text
from tink.trainer.books import Refused
from tink.trainer.engines.interface import Facts
from tink.trainer.samples import Samples
from tink.wire import tinker_pb2 as pb
from tink.wire.text_generation import MAX_PROMPTS, MAX_TEMPERATURE, MAX_TOP_K, NO_PROMPTS, Answer
from tink.wire.tink_train import SampleRequest
from tink.world import World

DEFAULT_TOKENS = 64
# Fields that were, or that ask for what is not served here.
GONE = {
    "max_len": "max_len is no longer used.  Replace with tokens_to_generate",
    "sentences": "sentences is no longer used.  Replace with prompts",
    "beam_width": "Beam search is no longer supported.",
}
UNSUPPORTED = ("top_p_decay", "top_p_bound", "prevent_newline_after_colon")


@dataclass(frozen=True, kw_only=True)
class Call:
    """`top_k` 0 and `top_p` 0.0 are off. `random_seed` None: any. `adapter`, which is Tink's own: an
    exported directory, as in a SampleRequest."""

    prompts: list[str]
    tokens_to_generate: int
    logprobs: bool
    temperature: float
    top_k: int
    top_p: float
    add_bos: bool
    stop_strings: list[str]
    stop_tokens: list[int]
    random_seed: int | None
    adapter: str | None


def read(body: bytes | bytearray) -> Call:
    """Raises MalformedRequest, in Megatron-LM's words where it has some. Fields that it does not know are
    ignored, as it does."""
    try:
        fields = msgspec.json.decode(body or b"{}", type=dict[str, Any])
    except UNREADABLE as error:
        raise MalformedRequest(f"the body is not a JSON map of fields: {error}") from error
    if "prompts" not in fields:
        raise MalformedRequest(NO_PROMPTS)
    for name, complaint in GONE.items():
        if name in fields:
            raise MalformedRequest(complaint)
    for name in UNSUPPORTED:
        if fields.get(name):
            raise MalformedRequest(f"{name} is not supported: leave it out")
    prompts = _prompts(fields["prompts"])
    count = _integer(fields, "tokens_to_generate", DEFAULT_TOKENS)
    logprobs = _boolean(fields, "logprobs")
    if not count and not logprobs:
        raise MalformedRequest("tokens_to_generate=0 implies logprobs should be True")
    temperature = _number(fields, "temperature", 1.0)
    if not 0.0 < temperature <= MAX_TEMPERATURE:
        raise MalformedRequest(
            f"temperature must be a positive number less than or equal to {MAX_TEMPERATURE}"
        )
    top_k = _integer(fields, "top_k", 0)
    if top_k > MAX_TOP_K:
        raise MalformedRequest(
            f"top_k must be equal to or greater than 0 and less than or equal to {MAX_TOP_K}"
        )
    top_p = _number(fields, "top_p", 0.0)
    if not 0.0 <= top_p <= 1.0:
        raise MalformedRequest("top_p must be a positive float less than or equal to 1.0")
    if top_p and top_k:
        raise MalformedRequest("cannot set both top-k and top-p samplings.")
    add_bos = _boolean(fields, "add_BOS")
    if not all(prompts) and not add_bos:
        raise MalformedRequest("Empty prompts require add_BOS=true")
    ends = {"stop_on_eol": "\n", "stop_on_double_eol": "\n\n"}
    adapter = fields.get("adapter")
    if not isinstance(adapter, str | None):
        raise MalformedRequest("adapter must be the path of an exported adapter")
    # Checked, and without a meaning here: there is no log of bodies, and no beam search.
    _boolean(fields, "no_log")
    _number(fields, "length_penalty", 1.0)
    return Call(
        prompts=prompts,
        tokens_to_generate=count,
        logprobs=logprobs,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        add_bos=add_bos,
        stop_strings=[end for name, end in ends.items() if _boolean(fields, name)],
        stop_tokens=[_integer(fields, "stop_token", 0)] if "stop_token" in fields else [],
        random_seed=_integer(fields, "random_seed", 0) if "random_seed" in fields else None,
        adapter=adapter,
    )


def _prompts(given: Any) -> list[str]:
    if not isinstance(given, list) or not all(isinstance(prompt, str) for prompt in given):
        raise MalformedRequest("prompts is not a list of strings")
    if not given:
        raise MalformedRequest("prompts is empty")
    if len(given) > MAX_PROMPTS:
        raise MalformedRequest(f"Maximum number of prompts is {MAX_PROMPTS}")
    return given


def _boolean(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise MalformedRequest(f"{name} must be a boolean value")
    return value


def _integer(fields: dict[str, Any], name: str, default: int) -> int:
    value = fields.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise MalformedRequest(f"{name} must be an integer greater than or equal to 0")
    return value


def _number(fields: dict[str, Any], name: str, default: float) -> float:
    value = fields.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < math.inf:
        raise MalformedRequest(f"{name} must be a number")
    return value


class TextGeneration:
    """Answers calls for a trainer that serves `facts`."""

    def __init__(self, world: World, samples: Samples, facts: Facts) -> None:
        self._world, self._samples, self._path = world, samples, facts.base_path
        self._text: Text | None = None

    async def answer(self, body: bytes | bytearray) -> Answer:
        """Raises UserError, BackendError, or the samples' Refused while they are too many. Cancelled, the
        samples that have begun go on to their end."""
        call = read(body)
        text = await self._tokenizer()
        prompts = await self._world.run_sync(_tokens, call, text)
        seed = self._world.new_seed() if call.random_seed is None else call.random_seed
        places: dict[tuple[int, ...], list[int]] = {}
        for place, prompt in enumerate(prompts):
            places.setdefault(tuple(prompt), []).append(place)
        rows: list[tuple[list[int], list[float | None]]] = [([], [])] * len(prompts)
        errors: list[TinkError | Refused] = []
        name = f"api-{self._world.new_id()}"

        async def sample(prompt: tuple[int, ...], mine: list[int]) -> None:
            request = SampleRequest(
                sample_id=f"{name}-{mine[0]}",
                prompt=list(prompt),
                seed=seed + mine[0],
                adapter=call.adapter,
                num_samples=len(mine),
                max_tokens=call.tokens_to_generate,
                temperature=call.temperature,
                top_k=call.top_k or -1,
                top_p=call.top_p or 1.0,
                stop_strings=call.stop_strings,
                stop_tokens=call.stop_tokens,
                prompt_logprobs=call.logprobs,
                wait=MAX_OP_WAIT,
            )
            try:
                drawn = await self._sample(request)
            except (TinkError, Refused) as error:
                errors.append(error)
                return
            for place, row in zip(mine, drawn, strict=True):
                rows[place] = row

        async with trio.open_nursery() as nursery:
            for each in places.items():
                nursery.start_soon(sample, *each)
        if errors:
            raise errors[0]
        return await self._world.run_sync(_answer, call, text, rows)

    async def _tokenizer(self) -> Text:
        if self._text is None:
            if self._path is None:
                raise UserError("the model that is served has no tokenizer")
            self._text = await self._world.run_sync(Text.load, Path(self._path))
        return self._text

    async def _sample(self, request: SampleRequest) -> list[tuple[list[int], list[float | None]]]:
        """Row by row: tokens, and the log-probabilities of all but the first."""
        reply = await self._samples.submit(request)
        while reply.state not in ("done", "failed"):
            reply = await self._samples.poll(request.sample_id, MAX_OP_WAIT)
        if reply.failure is not None:
            raise failed(reply.failure.category, reply.failure.message)
        response = pb.SampleResponse.FromString(reply.body)
        scored = _floats(response.prompt_logprobs)[1:]
        return [
            ([*request.prompt, *_ints(sequence.tokens)], [*scored, *_floats(sequence.logprobs)])
            for sequence in response.sequences
        ]


def _tokens(call: Call, text: Text) -> list[list[int]]:
    prompts = [text.encode(prompt) for prompt in call.prompts]
    if not call.add_bos:
        return prompts
    if text.bos is None:
        raise UserError("add_BOS: the model has no token that begins a text")
    return [prompt if prompt[:1] == [text.bos] else [text.bos, *prompt] for prompt in prompts]


def _answer(call: Call, text: Text, rows: Sequence[tuple[list[int], list[float | None]]]) -> Answer:
    return Answer(
        text=[text.decode(tokens) for tokens, _ in rows],
        tokens=[tokens for tokens, _ in rows],
        logprobs=[logprobs for _, logprobs in rows] if call.logprobs else None,
        segments=[text.pieces(tokens) for tokens, _ in rows],
    )


def _ints(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(data) // 4}i", data)


def _floats(data: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(data) // 4}f", data)
