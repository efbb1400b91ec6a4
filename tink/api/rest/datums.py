"""Training data in JSON, as the SDK's protobuf body."""

from __future__ import annotations

import struct
from typing import Any, Literal

import msgspec

from tink.api.chat import Message, Template
from tink.api.rest.forms import Form
from tink.domain import requests
from tink.domain.requests import Int, Prompt, TensorData
from tink.errors import MalformedRequest, UserError
from tink.pretrained import Text
from tink.wire import tinker_pb2 as pb

LossName = Literal["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo"]
# Each loss, and what a datum brings for it beside target_tokens.
LOSSES: dict[LossName, list[str]] = {
    "cross_entropy": ["weights"],
    "importance_sampling": ["logprobs", "advantages"],
    "ppo": ["logprobs", "advantages"],
    "cispo": ["logprobs", "advantages"],
    "dro": ["logprobs", "advantages"],
    "gspo": ["logprobs", "advantages"],
}
NO_CODE = (
    "a loss_fn is a name of GET /list_loss_functions. Functions are not taken, pickled or as source: they "
    "would run on the server. forward_backward_custom of the tinker SDK runs one at the client"
)


class Datum(Form, frozen=True):
    """As the SDK writes it in JSON; tokens and tensors may be plain lists."""

    model_input: Prompt | list[Int]
    loss_fn_inputs: dict[str, TensorData | list[float | Int]]


Chat = list[Message]


class Batch(Form, frozen=True):
    """`data`: chats, or datums."""

    model_id: str
    data: list[Chat | Datum]
    loss_fn: LossName = "cross_entropy"
    loss_fn_config: dict[str, float | str] = msgspec.field(default_factory=dict)

    @property
    def has_chats(self) -> bool:
        return any(isinstance(one, list) for one in self.data)


def encode(batch: Batch, side: tuple[Text, Template] | None, *, forward_only: bool) -> bytes:
    """`side` is needed for chats. The same batch gives the same bytes. UserError names the datum."""
    message = pb.ForwardBackwardRequest(
        model_id=batch.model_id, loss_fn=batch.loss_fn, forward_only=forward_only
    )
    for name, value in batch.loss_fn_config.items():
        setting = message.loss_fn_config_v2[name]
        if isinstance(value, str):
            setting.text = value
        else:
            setting.number = value
    for number, one in enumerate(batch.data):
        try:
            if isinstance(one, Datum):
                _datum(message.data.add(), one)
            else:
                assert side is not None, "a batch with chats comes with a tokenizer"
                _chat(message.data.add(), one, batch.loss_fn, *side)
        except (UserError, struct.error, OverflowError) as error:
            raise UserError(f"data[{number}]: {error}") from None
    return message.SerializeToString(deterministic=True)


def _datum(message: pb.Datum, datum: Datum) -> None:
    given = datum.model_input
    _tokens(message, given if isinstance(given, list) else given.tokens)
    for name, tensor in datum.loss_fn_inputs.items():
        if isinstance(tensor, list):
            whole = all(isinstance(value, int) for value in tensor)
            tensor = TensorData(tensor, "int64" if whole else "float32")
        if tensor.sparse_crow_indices is not None:
            raise UserError(f"{name} is sparse: send it dense")
        _tensor(message.loss_fn_inputs[name], tensor)


def _chat(message: pb.Datum, chat: Chat, loss_fn: str, text: Text, template: Template) -> None:
    """The next token is the target, and the loss is that of the assistant's turns alone."""
    if loss_fn != "cross_entropy":
        raise UserError(f"chats are for the loss cross_entropy; for {loss_fn[:80]} send datums")
    tokens, assistant = template.teach(chat, text)
    _tokens(message, tokens[:-1])
    _tensor(message.loss_fn_inputs["target_tokens"], TensorData([*tokens[1:]], "int64"))
    _tensor(message.loss_fn_inputs["weights"], TensorData([*map(float, assistant[1:])], "float32"))


def _tokens(message: pb.Datum, tokens: list[int]) -> None:
    message.model_input.add().encoded_text.tokens = struct.pack(f"<{len(tokens)}i", *tokens)


def _tensor(message: pb.Tensor, tensor: TensorData) -> None:
    kinds: dict[str, tuple[str, Any, pb.DType.ValueType]] = {
        "int64": ("q", int, pb.DTYPE_INT64),
        "float32": ("f", float, pb.DTYPE_FLOAT32),
    }
    if tensor.dtype not in kinds:
        raise UserError(f"the dtype {tensor.dtype[:80]!r} is not read: int64 and float32 are")
    letter, kind, dtype = kinds[tensor.dtype]
    message.dense = struct.pack(f"<{len(tensor.data)}{letter}", *map(kind, tensor.data))
    message.dtype = dtype
    message.shape.extend(tensor.shape if tensor.shape is not None else [len(tensor.data)])


def decode(text: bytes) -> Batch:
    """MalformedRequest with the path of the field that is wrong."""
    try:
        batch: Batch = requests.decode(text, Batch)
    except MalformedRequest as error:
        about_loss = any(sign in str(error) for sign in ("$.loss_fn`", "unknown field"))
        raise MalformedRequest(f"{error}. {NO_CODE}") if about_loss else error from None
    return batch
