"""A model's lane, under any interleaving: in order, one at a time, each at most once, never stuck."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tink.domain.lane import Lane


class AnyLane(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.lane = Lane()
        self.arrived: set[int] = set()
        self.refused: set[int] = set()
        self.started: list[int] = []
        self.running: int | None = None
        self.skipped: set[int] = set()

    @rule(ahead=st.integers(-3, 6))
    def arrive(self, ahead: int) -> None:
        """Each number once: the journal knows a repeat."""
        seq = self.lane.next_seq + ahead
        if seq < 0 or seq in self.arrived | self.refused:
            return
        consumed = set(self.started) | self.skipped
        in_time = self.lane.arrive(seq, f"job {seq}")
        assert in_time == (seq not in consumed)
        (self.arrived if in_time else self.refused).add(seq)

    @rule()
    def start(self) -> None:
        job = self.lane.start()
        waiting = self.arrived - set(self.started)
        if job is None:
            assert self.running is not None or self.lane.next_seq not in waiting
            return
        assert self.running is None
        seq = int(job.removeprefix("job "))
        assert seq in waiting
        assert seq > max(self.started, default=-1)
        assert all(n in self.started or n in self.skipped for n in range(seq))
        self.started.append(seq)
        self.running = seq

    @precondition(lambda self: self.running is not None)
    @rule()
    def finish(self) -> None:
        self.lane.finish(f"job {self.running}")
        self.running = None

    @rule(stranger=st.integers(0, 20))
    def finish_another(self, stranger: int) -> None:
        if stranger != self.running:
            with pytest.raises(ValueError, match="not running"):
                self.lane.finish(f"job {stranger}")

    @rule()
    def skip(self) -> None:
        gap = self.lane.gap()
        if gap is None:
            return
        first, last = gap
        self.skipped |= set(range(first, last + 1))
        self.lane.skip(last)
        assert self.lane.gap() is None
        # Something was waiting behind the gap, and goes now.
        self.start()
        assert self.running is not None

    @invariant()
    def its_end_is_behind_all_that_have_come(self) -> None:
        come = self.arrived | self.refused | self.skipped
        assert self.lane.end() == max(come, default=-1) + 1

    @invariant()
    def a_gap_is_what_is_missing_before_what_waits(self) -> None:
        waiting = self.arrived - set(self.started)
        gap = self.lane.gap()
        if gap is not None:
            assert self.running is None
            assert gap == (self.lane.next_seq, min(waiting) - 1)
            assert gap[0] <= gap[1]
        elif self.running is None and waiting:
            assert min(waiting) == self.lane.next_seq


AnyLane.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestAnyLane = AnyLane.TestCase


def test_what_runs_next_is_what_has_come_right_behind_the_running_one() -> None:
    lane = Lane()
    for seq in (0, 1, 2, 3, 5):
        lane.arrive(seq, f"job {seq}")
    assert lane.behind() is None
    lane.start()
    assert lane.behind() == "job 1"
    lane.finish("job 0")
    lane.start()
    assert lane.behind() == "job 2"
    lane.finish("job 1")
    lane.start()
    lane.finish("job 2")
    lane.start()
    assert lane.behind() is None  # 4 has not come
