"""What was forgotten of a model is waited for no more."""

from __future__ import annotations

from typing import Any

import trio
from trio.testing import MockClock

from tink.actors.jobs import Jobs
from tink.actors.lanes import Lanes
from tink.domain.ledger import Ledger
from tink.journal.present import Present
from tink.limits import SEQ_GAP_SECONDS

MODEL = "5e55:train:0"


class Books:
    """Of the journal, what lanes ask of it; a double."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.present = Present(self.ledger)
        self.appended: list[Any] = []

    async def append(self, *entries: Any) -> None:
        await trio.lowlevel.checkpoint()
        self.appended += entries


async def _after_a_gap(*, dropped: bool) -> tuple[Lanes, list[Any]]:
    books: Any = Books()
    lanes = Lanes(books, Jobs(1), [])
    lanes.of(MODEL).arrive(2, f"{MODEL}:2")
    lanes.advance(MODEL)
    if dropped:
        lanes.drop(MODEL)
    with trio.move_on_after(2 * SEQ_GAP_SECONDS):
        await lanes.run()
    return lanes, books.appended


async def test_a_lane_that_was_dropped_skips_no_number(autojump_clock: MockClock) -> None:
    lanes, appended = await _after_a_gap(dropped=True)
    assert MODEL not in lanes
    assert appended == []


async def test_one_that_waits_does(autojump_clock: MockClock) -> None:
    lanes, appended = await _after_a_gap(dropped=False)
    assert len(appended) == 1
    assert lanes.of(MODEL).running == f"{MODEL}:2"
