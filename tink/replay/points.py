"""A point of a journal, as a person names it: an event's number, a time, or the end."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable

import msgspec

from tink.errors import UserError
from tink.journal.store import Span

FORMS = "an event's number (4711), a time (2026-11-24T06:00, or @1764000000.5) or 'end' is one"

# What fits SQLite's integers.
_SEQ = re.compile(r"[0-9]{1,18}", re.ASCII)
_EPOCH = re.compile(r"@([0-9]{1,12}(\.[0-9]*)?)", re.ASCII)


class Seq(msgspec.Struct, frozen=True):
    """Right behind this event."""

    number: int


class Moment(msgspec.Struct, frozen=True):
    """Behind the last event that is not later: seconds since the epoch."""

    at: float


class End(msgspec.Struct, frozen=True):
    """Behind the last event."""


Point = Seq | Moment | End


def parse(text: str) -> Point:
    """A time without a zone is this machine's local one. UserError for what is none of these."""
    if text == "end":
        return End()
    if _SEQ.fullmatch(text):
        return Seq(int(text))
    if epoch := _EPOCH.fullmatch(text):
        return Moment(float(epoch[1]))
    try:
        return Moment(datetime.datetime.fromisoformat(text).timestamp())
    except (ValueError, OverflowError, OSError):
        raise UserError(f"{text[:80]!r} is no point of a journal: {FORMS}") from None


def resolve(point: Point, span: Span, seq_at: Callable[[float], int], show: Callable[[float], str]) -> int:
    """The number of the event behind which it is. `seq_at` finds a time among the events, `show` writes one
    for a person. UserError outside of what the journal holds."""
    match point:
        case End():
            return span.last
        case Seq(number) if 1 <= number <= span.last:
            return number
        # To the second in which it ended: nobody types more of a time than that.
        case Moment(at) if span.began <= at <= math.ceil(span.ended):
            return seq_at(at)
        case Seq(number):
            asked = f"event {number}"
        case Moment(at):
            asked = _shown(at, show)
    raise UserError(
        f"there is no {asked} in this journal: it has events 1 to {span.last}, "
        f"{show(span.began)} to {show(span.ended)}"
    )


def _shown(at: float, show: Callable[[float], str]) -> str:
    try:
        return show(at)
    except (ValueError, OverflowError, OSError):  # the year 10000, or one before the epoch
        return f"@{at:.15g}"
