"""From the SDK's protobuf body to tensors, checked, and from log-probabilities back to protobuf.

A body that passes `decode` can only fail later for want of memory or because its loss overflows:
every shape, token id and number has been looked at here, and an error names the datum and the field.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from google.protobuf.message import DecodeError

from tink.errors import MalformedRequest, UserError
from tink.limits import MAX_TRAINING_BODY
from tink.trainer import losses
from tink.wire import tinker_pb2 as pb

Tensor = Any
Array = np.ndarray[Any, np.dtype[Any]]

# Widths are rounded up to this, so that the arithmetic of a datum does not hang on the exact lengths
# of its neighbours, and so that kernels see few shapes.
BUCKET = 32

# bfloat16 is the upper half of a float32.
_BFLOAT16 = np.dtype("<u2")
_DTYPES: Mapping[int, np.dtype[Any]] = {
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_INT64: np.dtype("<i8"),
    pb.DTYPE_INT32: np.dtype("<i4"),
    pb.DTYPE_BFLOAT16: _BFLOAT16,
}


@dataclass(frozen=True)
class Datum:
    """`tokens` int64 (N,); `targets` int64 (N,) or (N, K); `inputs` float32 in the shape of targets."""

    tokens: Tensor
    targets: Tensor
    inputs: dict[str, Tensor]

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def columns(self) -> int:
        """K: targets per position."""
        return 1 if self.targets.ndim == 1 else int(self.targets.shape[1])


@dataclass(frozen=True)
class Batch:
    loss: losses.Loss
    config: dict[str, float]
    data: list[Datum]

    @property
    def tokens(self) -> int:
        return sum(datum.length for datum in self.data)


def decode(body: bytes, vocab_size: int, context: int) -> Batch:
    """A ForwardBackwardRequest, or UserError. Its model_id, seq_id and forward_only are the worker's
    business: what is to be done with the batch, the operation says."""
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise MalformedRequest(f"the body is not a ForwardBackwardRequest: {error}") from error
    loss, config = losses.find(message.loss_fn, _config(message))
    if not message.data:
        raise UserError("data is empty: send at least one datum")
    _check_size(message)
    limits = _Limits(vocab_size, context)
    data = []
    for index, datum in enumerate(message.data):
        try:
            data.append(_datum(datum, loss, limits))
        except UserError as error:
            raise UserError(f"data[{index}]: {error}") from error
    return Batch(loss, config, data)


@dataclass(frozen=True)
class _Limits:
    vocab_size: int
    context: int


def _config(message: pb.ForwardBackwardRequest) -> dict[str, float | str]:
    """Newer clients write both maps; the second knows text."""
    if not message.loss_fn_config_v2:
        return dict(message.loss_fn_config)
    return {
        key: value.text if value.WhichOneof("value") == "text" else value.number
        for key, value in message.loss_fn_config_v2.items()
    }


def _check_size(message: pb.ForwardBackwardRequest) -> None:
    """A few sparse bytes can name any number of cells: all of them together may take no more than a
    dense body could."""
    cells = sum(
        abs(math.prod(tensor.shape))
        for datum in message.data
        for tensor in datum.loss_fn_inputs.values()
        if tensor.HasField("sparse_csr")
    )
    if cells > MAX_TRAINING_BODY // 4:
        raise UserError(f"the sparse tensors have {cells} cells; at most {MAX_TRAINING_BODY // 4} are read")


def _datum(message: pb.Datum, loss: losses.Loss, limits: _Limits) -> Datum:
    tokens = _tokens(message.model_input, limits)
    fields = message.loss_fn_inputs
    missing = [name for name in ("target_tokens", *loss.required) if name not in fields]
    if missing:
        raise UserError(f"loss_fn_inputs lacks {', '.join(missing)}")
    targets = _field("target_tokens", fields["target_tokens"])
    _check_targets(targets, len(tokens), loss, limits)
    inputs = {}
    for name in (*loss.required, *loss.optional):
        if name in fields:
            value = _field(name, fields[name]).astype(np.float32)
            if value.shape != targets.shape:
                raise UserError(f"{name} has shape {value.shape}, target_tokens has {targets.shape}")
            inputs[name] = torch.from_numpy(value)
    return Datum(tokens, torch.from_numpy(targets.astype(np.int64)), inputs)


def _tokens(chunks: Sequence[pb.Chunk], limits: _Limits) -> Tensor:
    """The model input: text chunks, one after the other."""
    parts = []
    for number, chunk in enumerate(chunks):
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise UserError(
                f"model_input chunk {number} is {kind or 'empty'}: this model reads text tokens only"
            )
        parts.append(_array(chunk.encoded_text.tokens, np.dtype("<i4"), "model_input"))
    tokens = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
    if not 0 < len(tokens) <= limits.context:
        raise UserError(f"model_input has {len(tokens)} tokens; it must have 1 to {limits.context}")
    _check_ids("model_input", tokens, limits.vocab_size)
    return torch.from_numpy(tokens)


def _check_targets(targets: Array, length: int, loss: losses.Loss, limits: _Limits) -> None:
    if not np.issubdtype(targets.dtype, np.integer):
        raise UserError("target_tokens must be integers")
    wide = targets.ndim == 2 and loss.wide and targets.shape[1] > 0
    if not (targets.ndim == 1 or wide) or targets.shape[0] != length:
        shape = f"({length},)" + (f" or ({length}, K)" if loss.wide else "")
        raise UserError(
            f"target_tokens has shape {targets.shape}; for this loss and a model_input of {length} "
            f"tokens it must be {shape}"
        )
    _check_ids("target_tokens", targets, limits.vocab_size)


def _check_ids(name: str, ids: Array, vocab_size: int) -> None:
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        raise UserError(
            f"{name} has token id {wrong.flat[0]}; the vocabulary is 0 to {vocab_size - 1}"
            + (" (to ignore a position, give it weight 0)" if wrong.flat[0] < 0 else "")
        )


def _field(name: str, message: pb.Tensor) -> Array:
    """A tensor, dense: what a sparse one does not list is 0."""
    dtype = _DTYPES.get(message.dtype)
    if dtype is None:
        raise UserError(f"{name} has dtype {message.dtype}; float32 and int64 are understood")
    encoding = message.WhichOneof("encoding")
    values = _array(message.sparse_csr.values if encoding == "sparse_csr" else message.dense, dtype, name)
    if dtype is _BFLOAT16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    if not np.isfinite(values).all():
        raise UserError(f"{name} has a number that is not finite")
    shape = tuple(message.shape)
    if encoding == "sparse_csr":
        return _densified(name, message.sparse_csr, values, shape)
    # One dimension needs no shape; the SDK leaves it out for lists.
    shape = shape or (len(values),)
    if min(shape) < 0 or int(np.prod(shape)) != len(values):
        raise UserError(f"{name} has {len(values)} values, which do not fill shape {shape}")
    return values.reshape(shape)


def _densified(name: str, csr: pb.SparseCsr, values: Array, shape: tuple[int, ...]) -> Array:
    rows = _array(csr.crow_indices, np.dtype("<i8"), name)
    columns = _array(csr.col_indices, np.dtype("<i8"), name)
    if len(shape) != 2 or min(shape) < 0:
        raise UserError(f"{name} is sparse, and its shape {shape} is not (N, K)")
    sound = (
        len(rows) == shape[0] + 1
        and len(columns) == len(values)
        and rows[0] == 0
        and rows[-1] == len(values)
        and bool((np.diff(rows) >= 0).all())
        and bool(((columns >= 0) & (columns < shape[1])).all())
    )
    if not sound:
        raise UserError(f"{name} is sparse, and its indices do not fit its shape {shape}")
    dense = np.zeros(shape, values.dtype)
    dense[np.repeat(np.arange(shape[0]), np.diff(rows)), columns] = values
    return dense


def _array(data: bytes, dtype: np.dtype[Any], name: str) -> Array:
    if len(data) % dtype.itemsize:
        raise UserError(f"{name} has {len(data)} bytes, which is no whole number of {dtype}")
    return np.frombuffer(data, dtype)


# -- grouping -------------------------------------------------------------------------------------


def width(length: int) -> int:
    """What a sequence is padded to when it is the longest of its micro-batch."""
    return -(-length // BUCKET) * BUCKET


def micro_batches(data: Sequence[Datum], tokens: int) -> Iterator[list[Datum]]:
    """The data in their order, in groups of one K whose padded size is within so many tokens (or of one
    datum). A function of the request alone, so that a redo does the same arithmetic."""
    for _, same in groupby(data, key=lambda datum: datum.columns):
        group: list[Datum] = []
        widest = 0
        for datum in same:
            grown = max(widest, width(datum.length))
            if group and grown * (len(group) + 1) > tokens:
                yield group
                group, grown = [], width(datum.length)
            group.append(datum)
            widest = grown
        yield group


# -- the answer -----------------------------------------------------------------------------------


def encode(logprobs: Sequence[Tensor], metrics: Mapping[str, float]) -> bytes:
    """A ForwardBackwardOutput with float32 `logprobs` per datum, each in the shape of its targets.
    Neighbours that agree in all but their length share a record. Metric names are `what:reduction`."""
    message = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    for trailing, same in groupby(logprobs, key=lambda value: tuple(value.shape[1:])):
        arrays = [value.to(torch.float32).contiguous().cpu().numpy() for value in same]
        offsets = np.cumsum([0, *(array.nbytes for array in arrays)], dtype="<i8")
        record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(arrays))
        record.fields["logprobs"].CopyFrom(
            pb.BatchedTensor(
                data=b"".join(array.astype("<f4").tobytes() for array in arrays),
                offsets=offsets.tobytes(),
                dtype=pb.DTYPE_FLOAT32,
                trailing_shape=trailing,
            )
        )
    for name, value in metrics.items():
        assert name.count(":") == 1, name
        message.metrics[name] = value
    return message.SerializeToString(deterministic=True)
