"""A run of a few steps, for tests in which one thing happens to it half way."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.crash.runs import Run, sft

STEPS, SEED = 8, 5
PATIENCE_SECONDS = 120.0


def begun(url: str) -> Run:
    run = Run("sft", sft, SEED, STEPS)
    run.start(url)
    return run


def await_half(run: Run) -> None:
    wait(lambda: len(run.results) > STEPS, "the run is half way")


def ended(run: Run) -> Run:
    """Once it has; without an error."""
    wait(lambda: run.ended, "the run ended")
    assert run.error is None
    return run


def wait(done: Callable[[], object], what: str) -> None:
    """Other processes give no event to wait for, so this looks, and again."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not done():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.02)
