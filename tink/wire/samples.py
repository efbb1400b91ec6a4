"""How samples are packed into the SDK's SampleResponse, whoever has drawn them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from tink.wire import tinker_pb2 as pb

# What an empty cell of a TopkLogprobs has.
NO_TOKEN, NO_LOGPROB = 0, -99999.0


class Sampled(NamedTuple):
    """`body`: a SampleResponse protobuf."""

    body: bytes
    tokens_in: int
    tokens_out: int

    @classmethod
    def of(cls, response: pb.SampleResponse, prompt: Sequence[int]) -> Sampled:
        tokens_out = sum(len(sequence.tokens) // 4 for sequence in response.sequences)
        return cls(response.SerializeToString(deterministic=True), len(prompt), tokens_out)


def sequence(tokens: Sequence[int], logprobs: Sequence[float], *, stopped: bool) -> pb.SampledSequence:
    """ValueError for numbers that do not fit."""
    return pb.SampledSequence(
        stop_reason=pb.STOP_REASON_STOP if stopped else pb.STOP_REASON_LENGTH,
        tokens=ints(tokens),
        logprobs=floats(logprobs),
    )


def ints(values: Sequence[int]) -> bytes:
    """ValueError for one that is no int32."""
    try:
        return struct.pack(f"<{len(values)}i", *values)
    except struct.error as error:
        raise ValueError(error) from error


def floats(values: Sequence[float]) -> bytes:
    """ValueError for one that float32 cannot hold."""
    try:
        return struct.pack(f"<{len(values)}f", *values)
    except (struct.error, OverflowError) as error:
        raise ValueError(error) from error


# The sample of no tokens.
EMPTY = sequence([], [], stopped=False)
