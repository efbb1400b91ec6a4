"""Random programs under random faults: the promises hold for every seed."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tests.simulation import chaos, steps
from tests.simulation.program import program

REGRESSIONS = Path(__file__).with_name("regressions.txt")


def test_the_same_seed_gives_the_same_trace(tmp_path: Path) -> None:
    what = program(5)
    first = chaos.simulate(tmp_path / "a", 5, what, disturbed=True)
    second = chaos.simulate(tmp_path / "b", 5, what, disturbed=True)
    assert first == second
    other = chaos.simulate(tmp_path / "c", 6, what, disturbed=True)
    assert other.trace != first.trace


@pytest.mark.parametrize("seed", [int(line) for line in REGRESSIONS.read_text().split()])
def test_what_once_failed_does_not_fail_again(seed: int) -> None:
    assert chaos.check(seed) is None


@pytest.mark.slow
def test_a_crash_at_any_step_changes_nothing() -> None:
    """Between any two steps of any tasks, and so at every await. tools/simulate --steps takes each."""
    with ProcessPoolExecutor(2) as pool:
        wrong = list(pool.map(steps.check, steps.crashes(every=4), chunksize=8))
    assert len(wrong) > 150
    assert [found for found in wrong if found is not None] == []


@pytest.mark.slow
def test_no_fault_changes_what_a_client_gets() -> None:
    """tools/simulate runs more of them."""
    with ProcessPoolExecutor(2) as pool:
        verdicts = list(pool.map(chaos.verdict_of, range(200), chunksize=4))
    assert {seed: verdict.wrong for seed, verdict in enumerate(verdicts) if verdict.wrong is not None} == {}
    # A fault that strikes nowhere any more, because what it waits for has another name, proves nothing.
    reached = chaos.reached(sum((verdict.counts for verdict in verdicts), Counter()))
    assert [
        (name, what) for name, row in reached.items() for what, count in row.items() if count == 0
    ] == []
