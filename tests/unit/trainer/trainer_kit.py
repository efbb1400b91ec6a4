"""What the tests of the trainer share: request bodies, answers read back, a model to try them on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from tink.trainer.corpus import Docstring
from tink.trainer.engines.lora_engine import LoraEngine
from tink.trainer.tiny import Shape
from tink.wire import tinker_pb2 as pb
from tink.wire.tink_train import CreateModel, ForwardBackward, OptimStep

SHAPE = Shape(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=96,
)
TEXTS = [
    Docstring(
        f"module.name{n}",
        f"Return the {n} thing of a list, or raise an error when there is none of them.\n",
    )
    for n in range(40)
]


def tensor(values: Any, dtype: int | None = None) -> pb.Tensor:
    """Integers travel as int64, the rest as float32."""
    array = np.asarray(values)
    integers = np.issubdtype(array.dtype, np.integer)
    if dtype is None:
        dtype = pb.DTYPE_INT64 if integers else pb.DTYPE_FLOAT32
    kinds = {pb.DTYPE_INT64: "<i8", pb.DTYPE_INT32: "<i4", pb.DTYPE_FLOAT32: "<f4"}
    if dtype == pb.DTYPE_BFLOAT16:
        data = (array.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    else:
        data = array.astype(kinds[dtype]).tobytes()
    return pb.Tensor(dense=data, dtype=dtype, shape=array.shape)


def sparse(dense: Any) -> pb.Tensor:
    array = np.asarray(dense)
    rows, columns = np.nonzero(array)
    message = tensor(array[rows, columns])
    values = message.dense
    message.sparse_csr.values = values
    ends = np.cumsum(np.bincount(rows, minlength=array.shape[0]))
    message.sparse_csr.crow_indices = np.concatenate([[0], ends]).astype("<i8").tobytes()
    message.sparse_csr.col_indices = columns.astype("<i8").tobytes()
    del message.shape[:]
    message.shape.extend(array.shape)
    return message


def chunk(tokens: Sequence[int]) -> pb.Chunk:
    return pb.Chunk(encoded_text=pb.EncodedTextChunk(tokens=np.array(tokens, "<i4").tobytes()))


def datum(tokens: Sequence[int], **inputs: Any) -> pb.Datum:
    """Inputs are arrays, or ready Tensor messages."""
    return pb.Datum(
        model_input=[chunk(tokens)],
        loss_fn_inputs={
            name: value if isinstance(value, pb.Tensor) else tensor(value) for name, value in inputs.items()
        },
    )


def body(
    data: Sequence[pb.Datum],
    loss_fn: str = "cross_entropy",
    config: Mapping[str, float | str] | None = None,
) -> bytes:
    message = pb.ForwardBackwardRequest(model_id="m", seq_id=1, data=data, loss_fn=loss_fn)
    for name, value in (config or {}).items():
        if isinstance(value, str):
            message.loss_fn_config_v2[name].text = value
        else:
            message.loss_fn_config_v2[name].number = value
    return message.SerializeToString()


def supervised(seed: int = 0, lengths: Sequence[int] = (5, 40, 17)) -> list[pb.Datum]:
    """Random text with weights of both signs."""
    random = np.random.default_rng(seed)
    return [
        datum(
            random.integers(0, 320, n).tolist(),
            target_tokens=random.integers(0, 320, n),
            weights=random.normal(size=n).astype(np.float32),
        )
        for n in lengths
    ]


def logprobs(encoded: bytes) -> list[np.ndarray]:
    """Per datum, in the shape of its targets but for (N,) that comes back as it was."""
    message = pb.ForwardBackwardOutput.FromString(encoded)
    found = []
    for record in message.loss_fn_outputs:
        field = record.fields["logprobs"]
        offsets = np.frombuffer(field.offsets, "<i8")
        assert len(offsets) == record.num_datums + 1
        for start, stop in pairwise(offsets):
            flat = np.frombuffer(field.data[start:stop], "<f4")
            found.append(flat.reshape(-1, *field.trailing_shape))
    return found


def sampled(encoded: bytes) -> pb.SampleResponse:
    return pb.SampleResponse.FromString(encoded)


def ints(data: bytes) -> list[int]:
    return np.frombuffer(data, "<i4").tolist()


def floats(data: bytes) -> np.ndarray:
    return np.frombuffer(data, "<f4")


CREATE = CreateModel(rank=4, alpha=8.0, seed=7)
# Big enough an eps that a gradient of 1e-9 is nothing on both sides.
STEP = OptimStep(learning_rate=0.01, eps=1e-4, weight_decay=0.1, grad_clip_norm=5.0)


def train(engine: LoraEngine, model_id: str, steps: int = 2, seed: int = 0) -> list[bytes]:
    """Two accumulated batches before each step; the encoded answers."""
    answers = []
    for step in range(steps):
        for part in range(2):
            request = body(supervised(seed + 10 * step + part))
            answers.append(engine.forward_backward(model_id, ForwardBackward(request)).body)
        engine.optim_step(model_id, STEP)
    return answers


def state(engine: LoraEngine, model_id: str, path: str) -> dict[str, str]:
    """Everything of a model, as hashes."""
    files = engine.snapshot(model_id, path, b"", path)
    return {file.name: file.sha256 for file in files}
