"""Continuations of a prompt, with a KV cache, one request at a time.

The rows of a batch are the samples of one request and nothing else, and they have one length, so no
padding and no mask exist: the answer is a function of the request. A row that ends leaves the batch.
Log-probabilities are the model's own (temperature 1, nothing cut off), whatever the draw was from, so
that they can be compared with what training computes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch

from tink.domain import sampling
from tink.errors import UserError
from tink.limits import SAMPLE_ROWS
from tink.trainer.engines import drawing, lora, scores
from tink.trainer.engines.base_model import BaseModel
from tink.trainer.engines.stops import Stops
from tink.trainer.progress import beat
from tink.wire import samples
from tink.wire import tinker_pb2 as pb
from tink.wire.samples import Sampled
from tink.wire.tink_train import SampleRequest

Tensor = Any


@dataclass
class Continuation:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    stopped: bool = False


def sample(base: BaseModel, adapter: lora.Adapter | None, request: SampleRequest) -> Sampled:
    """UserError when the request cannot be served by this model."""
    check(request, base)
    with torch.inference_mode():
        cache = base.new_cache()
        with lora.using(adapter):
            hidden = base.hidden(torch.tensor([request.prompt], device=base.device), cache)[0]
        response = pb.SampleResponse()
        if request.scores_prompt:
            scores.fill(response, request, base, adapter, hidden)
        sequences: list[Continuation] = []
        for first in range(0, request.num_samples, SAMPLE_ROWS):
            rows = range(first, min(first + SAMPLE_ROWS, request.num_samples))
            last = rows.stop == request.num_samples
            own = cache if last else copy.deepcopy(cache)
            sequences += _generate(base, adapter, request, rows, hidden[-1:], own)
    response.sequences.extend(_message(sequence, request) for sequence in sequences)
    return Sampled.of(response, request.prompt)


def _generate(
    base: BaseModel,
    adapter: lora.Adapter | None,
    request: SampleRequest,
    rows: range,
    hidden: Tensor,
    cache: Any,
) -> list[Continuation]:
    """Samples `rows` of the request, from the last hidden state (1, H) of its prompt."""
    eos = frozenset() if request.ignore_eos else base.eos
    stops = Stops(eos.union(request.stop_tokens), request.stop_strings, base.tokenizer)
    streams = drawing.Streams(request.seed, rows)
    sequences = [Continuation() for _ in rows]
    alive = list(range(len(rows)))
    limit = sampling.room(request, base.context)
    if not limit:
        return sequences
    cache.batch_repeat_interleave(len(rows))
    with lora.using(adapter):
        logits = base.head.logits(hidden).expand(len(rows), -1)
        for step in range(limit):
            beat()
            logprobs = logits.log_softmax(-1)
            if not torch.isfinite(logprobs.amax(-1)).all():
                raise UserError("the model's logits are not finite: its training has diverged")
            uniform = streams.next()[alive]
            # Sums along a row are not deterministic on a GPU.
            drawn = drawing.choose(logits.cpu(), uniform, request.temperature, request.top_k, request.top_p)
            chosen = drawn.to(logits.device)
            own = logprobs.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
            top = None
            if request.topk_sample_logprobs:
                top = scores.topk(logprobs, request.topk_sample_logprobs)
            going = []
            for place, (row, token, value) in enumerate(
                zip(alive, chosen.tolist(), own.tolist(), strict=True)
            ):
                sequence = sequences[row]
                sequence.tokens.append(token)
                sequence.logprobs.append(value)
                if top is not None:
                    sequence.top.append((top[1][place], top[0][place]))
                sequence.stopped = stops.ends(sequence.tokens)
                if not sequence.stopped:
                    going.append(place)
            if not going or step == limit - 1:
                break
            if len(going) < len(alive):
                index = torch.tensor(going, device=base.device)
                cache.batch_select_indices(index)
                chosen = chosen[index]
                alive = [alive[place] for place in going]
            logits = base.head.logits(base.hidden(chosen.unsqueeze(-1), cache)[:, -1])
    return sequences


def _message(sequence: Continuation, request: SampleRequest) -> pb.SampledSequence:
    message = samples.sequence(sequence.tokens, sequence.logprobs, stopped=sequence.stopped)
    if request.topk_sample_logprobs and sequence.top:
        ids, values = (torch.stack(part) for part in zip(*sequence.top, strict=True))
        message.topk_sampled_logprobs.CopyFrom(scores.topk_message(ids, values))
    return message


def check(request: SampleRequest, base: BaseModel) -> None:
    """UserError for what this model cannot do; the field is named."""
    length = len(request.prompt)
    if not 1 <= length <= base.context:
        raise UserError(f"the prompt has {length} tokens; it must have 1 to {base.context}")
    _check_ids("the prompt", request.prompt, base)
    _check_ids("stop", request.stop_tokens, base)
    sampling.check(request, base.context, base.vocab_size)
    if request.targets is not None:
        _check_targets(request.targets, length, base)


def _check_targets(targets: list[list[int]], length: int, base: BaseModel) -> None:
    if len(targets) != length - 1 or len({len(row) for row in targets}) > 1:
        raise UserError(
            f"target_prompt_logprobs must have len(prompt) - 1 = {length - 1} rows of one length"
        )
    _check_ids("target_prompt_logprobs", [i for row in targets for i in row if i != -1], base)


def _check_ids(name: str, ids: list[int], base: BaseModel) -> None:
    for token in ids:
        if not 0 <= token < base.vocab_size:
            raise UserError(f"{name} has token id {token}; the vocabulary is 0 to {base.vocab_size - 1}")
