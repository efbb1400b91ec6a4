"""What is left of a body when prompts, tokens and numbers are taken out of it: its shape. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from google.protobuf.message import DecodeError, Message

from tink.domain.requests import OpName
from tink.errors import UNREADABLE
from tink.wire import tinker_pb2 as pb

Part = Literal["request", "result"]

# Of the operations whose bodies are data; a request of a sample is JSON.
_MESSAGES: dict[tuple[OpName, Part], type[Message]] = {
    ("forward", "request"): pb.ForwardBackwardRequest,
    ("forward_backward", "request"): pb.ForwardBackwardRequest,
    ("forward", "result"): pb.ForwardBackwardOutput,
    ("forward_backward", "result"): pb.ForwardBackwardOutput,
    ("sample", "result"): pb.SampleResponse,
}


def shape(content: bytes, op: OpName, part: Part) -> Any:
    """For JSON: names stay, and what stands for text, bytes and lists of numbers is how long they are. A
    body that is not what its operation has is its size alone."""
    kind = _MESSAGES.get((op, part))
    try:
        if kind is None:
            return _shape(msgspec.json.decode(content))
        return _shape(kind.FromString(content))
    except (DecodeError, *UNREADABLE):
        return f"{len(content)} bytes"


def _shape(value: Any) -> Any:
    match value:
        case Message():
            return {field.name: _shape(part) for field, part in value.ListFields()}
        case str():
            return f"{len(value)} characters"
        case bytes():
            return f"{len(value)} bytes"
        case bool() | int() | float() | None:
            return value
        case Mapping():
            return {str(name): _shape(part) for name, part in value.items()}
    parts = list(value)
    if parts and all(isinstance(part, (int, float)) for part in parts):
        return f"{len(parts)} numbers"
    return [_shape(part) for part in parts]
