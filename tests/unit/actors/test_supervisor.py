"""A crashed actor starts again, with back-off; what a restart cannot mend passes through."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
import trio
from trio.testing import MockClock

from tests.unit.journal.journal_kit import InlineWorld
from tink.actors.supervisor import supervise
from tink.errors import BackendError, JournalUnavailable, StartupError, UserError
from tink.limits import CALM_SECONDS, LONGEST_ACTOR_PAUSE_SECONDS, PAUSE_SECONDS


@pytest.fixture(autouse=True)
def quiet() -> Iterator[list[Any]]:
    """What is logged; to render a traceback takes longer than the test."""
    with structlog.testing.capture_logs() as lines:
        yield lines


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), BackendError("gone"), UserError("bad"), KeyError(1)]
)
async def test_a_crash_starts_it_again_with_back_off(
    autojump_clock: MockClock, error: Exception, quiet: list[Any]
) -> None:
    starts: list[float] = []

    async def run() -> None:
        starts.append(trio.current_time())
        raise error

    with trio.move_on_after(100):
        await supervise("actor", run, InlineWorld())
    pauses = [after - before for before, after in itertools.pairwise(starts)]
    assert pauses[0] == pytest.approx(PAUSE_SECONDS)
    assert pauses[1] == pytest.approx(2 * PAUSE_SECONDS)
    assert max(pauses) == pytest.approx(LONGEST_ACTOR_PAUSE_SECONDS)
    assert pauses == pytest.approx(sorted(pauses))
    assert [line["restart_in"] for line in quiet[:3]] == [0.1, 0.2, 0.4]
    assert len(starts) > 10


async def test_one_that_ran_long_starts_again_at_once(autojump_clock: MockClock) -> None:
    starts: list[float] = []

    async def run() -> None:
        starts.append(trio.current_time())
        if len(starts) == 5:
            await trio.sleep(CALM_SECONDS + 1)
        raise ValueError

    with trio.move_on_after(80):
        await supervise("actor", run, InlineWorld())
    assert starts[5] - starts[4] == pytest.approx(CALM_SECONDS + 1 + PAUSE_SECONDS)
    assert starts[6] - starts[5] == pytest.approx(2 * PAUSE_SECONDS)


async def test_one_that_returns_starts_again_too(autojump_clock: MockClock) -> None:
    starts: list[float] = []

    async def run() -> None:
        starts.append(trio.current_time())

    with trio.move_on_after(1):
        await supervise("actor", run, InlineWorld())
    assert len(starts) > 2


@pytest.mark.parametrize("kind", [JournalUnavailable, StartupError])
@pytest.mark.parametrize("depth", [0, 1, 2])
async def test_what_a_restart_cannot_mend_passes(
    autojump_clock: MockClock, kind: type[Exception], depth: int
) -> None:
    """However deep in nurseries, and also when another task fails with it."""
    starts = 0

    async def run() -> None:
        nonlocal starts
        starts += 1
        error: Exception = kind("stop")
        for _ in range(depth):
            error = ExceptionGroup("nursery", [error, ValueError("another")])
        raise error

    with trio.fail_after(60), pytest.RaisesGroup(kind, flatten_subgroups=True):
        await supervise("actor", run, InlineWorld())
    assert starts == 1


async def test_cancellation_passes_also_out_of_a_crash(autojump_clock: MockClock) -> None:
    async def crash_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("in the clean-up")

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(crash_when_cancelled)
            nursery.start_soon(trio.sleep_forever)

    with trio.move_on_after(1) as scope:
        await supervise("actor", run, InlineWorld())
    assert scope.cancelled_caught
    assert trio.current_time() < 2
