"""What clients get, in JSON. A number that is not finite is null there."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class Answer(msgspec.Struct, frozen=True):
    pass


class Promise(Answer, frozen=True):
    """The job is on disk; /retrieve_future has what becomes of it."""

    request_id: str
    model_id: str | None


class Pending(Answer, frozen=True):
    status: Literal["pending"] = "pending"


class Model(Answer, frozen=True):
    model_id: str


class Stepped(Answer, frozen=True):
    model_id: str
    metrics: dict[str, float | None]


class Saved(Answer, frozen=True):
    """`path`: null for weights without a name."""

    model_id: str
    path: str | None


class Loaded(Answer, frozen=True):
    model_id: str
    path: str


class Tensor(Answer, frozen=True):
    """`data` is flat; the shape says how it is to be read."""

    data: list[float | int | None]
    dtype: Literal["float32", "int64"]
    shape: list[int]


class Trained(Answer, frozen=True):
    """`loss` is the sum. `loss_fn_outputs`: for each datum, its tensors by their names."""

    loss: float | None
    metrics: dict[str, float | None]
    loss_fn_outputs: list[dict[str, Tensor]]


class Sequence(Answer, frozen=True):
    """`prompt` says of which one. `text`: null where the server has no tokenizer of its model."""

    prompt: int
    tokens: list[int]
    text: str | None
    logprobs: list[float | None]
    stop_reason: Literal["stop", "length"]


class Sampled(Answer, frozen=True):
    sequences: list[Sequence]


class Loss(Answer, frozen=True):
    """`inputs`: what a datum brings for it beside target_tokens."""

    name: str
    inputs: list[str]


class Losses(Answer, frozen=True):
    loss_functions: list[Loss]


# Of the jobs whose result is JSON.
KINDS: dict[str, type[Answer]] = {
    "create_model": Model,
    "unload_model": Model,
    "optim_step": Stepped,
    "save_weights": Saved,
    "save_weights_for_sampler": Saved,
    "save_weights_external": Saved,
    "load_weights": Loaded,
}


def of(op: str, result: dict[str, Any], model_id: str) -> Answer:
    """A done job's, of what it journaled."""
    answer: Answer = msgspec.convert({**result, "model_id": model_id}, KINDS[op])
    return answer
