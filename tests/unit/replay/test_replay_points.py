"""A point of a journal is an event's number, a time, or the end; what is none is one clear line."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator

import pytest

from tink.errors import UserError
from tink.journal.store import Span
from tink.replay.points import End, Moment, Point, Seq, parse, resolve

SPAN = Span(4, 1000.5, 1003.25)
TIMES = [1000.5, 1002.0, 1001.0, 1003.25]  # the clock was set back once


def _seq_at(at: float) -> int:
    return max((seq for seq, time in enumerate(TIMES, 1) if time <= at), default=0)


def _resolved(point: Point) -> int:
    return resolve(point, SPAN, _seq_at, str)


@pytest.fixture(params=["UTC", "Asia/Kolkata"])
def zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """This machine's."""
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield request.param
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("text", "point"),
    [
        ("end", End()),
        ("4711", Seq(4711)),
        ("0", Seq(0)),
        ("@1764000000.5", Moment(1764000000.5)),
        ("@1764000000", Moment(1764000000.0)),
        ("2025-11-24T16:00:00.5Z", Moment(1764000000.5)),
        ("2025-11-24T21:30+05:30", Moment(1764000000.0)),
    ],
)
def test_a_point_is_a_number_a_time_or_the_end(text: str, point: Point) -> None:
    assert parse(text) == point


def test_a_time_without_a_zone_is_a_local_one(zone: str) -> None:
    hours = {"UTC": 0.0, "Asia/Kolkata": 5.5}[zone]
    assert parse("2025-11-24T16:00") == Moment(1764000000 - hours * 3600)
    midnight = datetime.datetime(2025, 11, 24, tzinfo=datetime.UTC).timestamp()
    assert parse("2025-11-24") == Moment(midnight - hours * 3600)


NO_POINTS = [
    *("", "END", "-1", "+1", "1.5", "1_0", "٤٧", "9" * 19, "@", "@x", "@-1", "@1e9", "@nan", "@1_0"),
    *("2025-13-01", "2025-11-24T25:00", "yesterday", "0001-01-01T00:00+23:00\n", "x" * 10_000),
]


@pytest.mark.parametrize("text", NO_POINTS)
def test_what_is_no_point_is_one_line_that_says_what_is(text: str) -> None:
    with pytest.raises(UserError, match=r"is no point of a journal: .*4711.*'end'") as raised:
        parse(text)
    assert len(str(raised.value)) < 250
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("point", "seq"),
    [
        (End(), 4),
        (Seq(1), 1),
        (Seq(4), 4),
        (Moment(1000.5), 1),
        (Moment(1000.9), 1),
        (Moment(1001.0), 3),  # the last event that is not later
        (Moment(1002.0), 3),
        (Moment(1003.25), 4),
        (Moment(1004.0), 4),  # what is typed of a time ends with its second
    ],
)
def test_a_time_means_behind_the_last_event_that_is_not_later(point: Point, seq: int) -> None:
    assert _resolved(point) == seq


@pytest.mark.parametrize(
    ("point", "asked"),
    [
        (Seq(0), "event 0"),
        (Seq(5), "event 5"),
        (Moment(1000.4), "1000.4"),
        (Moment(1004.5), "1004.5"),
    ],
)
def test_what_is_outside_of_the_journal_is_one_line_with_what_is_inside(point: Point, asked: str) -> None:
    with pytest.raises(UserError) as raised:
        _resolved(point)
    assert str(raised.value) == (
        f"there is no {asked} in this journal: it has events 1 to 4, 1000.5 to 1003.25"
    )


def test_a_time_that_no_calendar_has_is_told_in_seconds() -> None:
    def show(at: float) -> str:
        return datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat()

    with pytest.raises(UserError, match="there is no @999999999999 in"):
        resolve(parse("@999999999999"), SPAN, _seq_at, show)
