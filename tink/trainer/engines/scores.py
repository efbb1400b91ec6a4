"""What a prompt's own logits are asked for: log-probabilities of its tokens, of the likeliest ones, of
given ones, and draws.

Position i of a prompt is scored by the logits after the tokens before it; position 0 never is.
"""

from __future__ import annotations

from typing import Any

import torch

from tink.trainer.engines import drawing, lora
from tink.trainer.engines.base_model import BaseModel
from tink.wire import tinker_pb2 as pb
from tink.wire.samples import NO_LOGPROB, NO_TOKEN
from tink.wire.tink_train import SampleRequest

Tensor = Any


def fill(
    response: pb.SampleResponse,
    request: SampleRequest,
    base: BaseModel,
    adapter: lora.Adapter | None,
    hidden: Tensor,
) -> None:
    """Adds what the request asks of its prompt, whose hidden states (P, H) are given, to the response."""
    length = len(request.prompt)
    first = 1 if request.prompt_logprobs_last_n is None else length - request.prompt_logprobs_last_n
    own = torch.full((length,), float("nan"))
    top_ids = torch.full((length, request.topk_prompt_logprobs), NO_TOKEN)
    top_values = torch.full((length, request.topk_prompt_logprobs), NO_LOGPROB)
    columns = len(request.targets[0]) if request.targets else 0
    given = torch.tensor(request.targets or [], dtype=torch.int64).reshape(length - 1, columns)
    given_values = torch.zeros(given.shape)
    drawn = torch.zeros((length - 1, request.prompt_alt_tokens_k), dtype=torch.int64)
    drawn_values = torch.zeros(drawn.shape)
    random = drawing.generator(request.seed, "prompt")
    uniform = torch.rand(drawn.shape, generator=random, dtype=torch.float64)
    tokens = torch.tensor(request.prompt, device=base.device)

    for start in range(0, length - 1, base.head.rows):
        # Row r of these logits scores position r + 1.
        rows = slice(start, min(start + base.head.rows, length - 1))
        scored = slice(rows.start + 1, rows.stop + 1)
        with lora.using(adapter):
            logits = base.head.logits(hidden[rows])
        logprobs = logits.log_softmax(-1)
        own[scored] = logprobs.gather(-1, tokens[scored].unsqueeze(-1)).squeeze(-1)
        if top_ids.numel():
            top_values[scored], top_ids[scored] = topk(logprobs, request.topk_prompt_logprobs)
        if given.numel():
            ids = given[rows].to(base.device)
            found = logprobs.gather(-1, ids.clamp(min=0))
            given_values[rows] = found.masked_fill(ids < 0, 0.0)
        for column in range(drawn.shape[1]):
            choice = drawing.choose(logits.cpu(), uniform[rows, column], request.temperature)
            drawn[rows, column] = choice
            drawn_values[rows, column] = logprobs.gather(-1, choice.to(base.device).unsqueeze(-1)).squeeze(
                -1
            )

    if request.prompt_logprobs:
        own[:first] = float("nan")
        response.prompt_logprobs = own.numpy().astype("<f4").tobytes()
    if request.topk_prompt_logprobs:
        top_ids[:first], top_values[:first] = NO_TOKEN, NO_LOGPROB
        response.topk_prompt_logprobs.CopyFrom(topk_message(top_ids, top_values))
    if request.targets is not None:
        response.target_prompt_logprobs.CopyFrom(_floats(given_values))
    if request.prompt_alt_tokens_k:
        response.prompt_alt_tokens.tokens.CopyFrom(
            pb.Tensor(
                dense=drawn.numpy().astype("<i8").tobytes(),
                dtype=pb.DTYPE_INT64,
                shape=drawn.shape,
            )
        )
        response.prompt_alt_tokens.logprobs.CopyFrom(_floats(drawn_values))


def topk(logprobs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, ids) of the k likeliest of each row, likeliest first."""
    found = logprobs.topk(k, dim=-1)
    return found.values.cpu(), found.indices.cpu()


def topk_message(ids: Tensor, values: Tensor) -> pb.TopkLogprobs:
    return pb.TopkLogprobs(
        token_ids=ids.numpy().astype("<i4").tobytes(),
        logprobs=values.numpy().astype("<f4").tobytes(),
        k=ids.shape[1],
        length=ids.shape[0],
    )


def _floats(values: Tensor) -> pb.Tensor:
    return pb.Tensor(
        dense=values.numpy().astype("<f4").tobytes(),
        dtype=pb.DTYPE_FLOAT32,
        shape=values.shape,
    )
