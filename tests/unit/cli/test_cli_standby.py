"""A worker on PostgreSQL waits for what may be over in a moment, and for nothing else."""

from __future__ import annotations

import pytest

from tink.cli.serving import Past
from tink.cli.standby import _pause
from tink.errors import DatabaseInUse, JournalUnavailable, StartupError, TinkError
from tink.limits import DATABASE_LOOK_SECONDS

AWAY = "the server closed the connection"


@pytest.fixture
def past() -> Past:
    """Of a worker that has served, and serves no more."""
    past = Past()
    past.served = True
    return past


@pytest.mark.parametrize(
    "error",
    [
        JournalUnavailable(AWAY),
        StartupError(AWAY, may_pass=True),  # it went while it was looked what is there
        DatabaseInUse(AWAY),
    ],
    ids=["the journal", "before it is open", "another worker"],
)
def test_a_database_that_went_away_is_waited_for(past: Past, error: TinkError) -> None:
    assert _pause(ExceptionGroup("of a nursery", [error]), past) == DATABASE_LOOK_SECONDS


def test_one_that_was_lost_in_the_middle_is_looked_for_at_once(past: Past) -> None:
    past.serving = True
    assert _pause(JournalUnavailable(AWAY), past) == 0.0
    assert _pause(JournalUnavailable(AWAY), past) == DATABASE_LOOK_SECONDS


def test_what_waiting_does_not_mend_ends_it(past: Past) -> None:
    for error in (StartupError("the schema is a newer one"), ValueError("a bug")):
        with pytest.raises(type(error)):
            _pause(error, past)


def test_at_the_first_start_it_waits_only_for_what_may_pass() -> None:
    with pytest.raises(StartupError):
        _pause(JournalUnavailable("no such database"), Past())
    assert _pause(JournalUnavailable(AWAY, may_pass=True), Past()) == DATABASE_LOOK_SECONDS


def test_a_worker_that_was_told_to_stop_waits_for_nothing(past: Past) -> None:
    past.stop()
    with pytest.raises(JournalUnavailable):
        _pause(JournalUnavailable(AWAY), past)
