"""The leading fields of a body that cannot be served.

A job that is refused must still consume its number, or the jobs after it would wait for it for ever;
so its ids are read from whatever can be read. The SDK writes them first.
"""

from __future__ import annotations

import json
import re
from typing import Any

_BLANKS = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def json_members(text: bytes) -> dict[str, Any]:
    """The members of the object, up to the first that is not JSON (or has a NaN: that one is JSON to
    this decoder) or is cut off."""
    members: dict[str, Any] = {}
    source = text.decode(errors="replace")
    try:
        at = _after(source, 0, "{")
        while True:
            name, at = _DECODER.raw_decode(source, _skip(source, at))
            value, at = _DECODER.raw_decode(source, _skip(source, _after(source, at, ":")))
            members[name] = value
            at = _after(source, at, ",")
    except (ValueError, TypeError, RecursionError):
        return members


def _skip(source: str, at: int) -> int:
    match = _BLANKS.match(source, at)
    assert match is not None
    return match.end()


def _after(source: str, at: int, mark: str) -> int:
    at = _skip(source, at)
    if not source.startswith(mark, at):
        raise ValueError(mark)
    return at + 1


def protobuf_ids(message: bytes) -> dict[str, Any]:
    """`model_id` (field 1) and `seq_id` (field 2) of a ForwardBackwardRequest, if nothing that is
    unreadable comes before them."""
    found: dict[str, Any] = {}
    at = 0
    try:
        while len(found) < 2:
            tag, at = _varint(message, at)
            value: int | bytes
            value, at = _varint(message, at)
            if tag & 7 == 2:
                at, value = at + value, message[at : at + value]
                if at > len(message):
                    break
            elif tag & 7 != 0:
                break
            if tag == 1 << 3 | 2 and isinstance(value, bytes):
                found["model_id"] = value.decode()
            elif tag == 2 << 3:
                found["seq_id"] = value
    except (IndexError, ValueError):
        pass
    return found


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a varint has at most ten bytes")
