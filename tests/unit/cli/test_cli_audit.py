"""`tink audit` and `tink journal`: what they say when there is something to say."""

from __future__ import annotations

import json

import pytest

from tests.unit.journal.journal_kit import written
from tink.cli import journal as command


@pytest.mark.parametrize("days", ["0", "-1", "many"])
def test_days_that_are_none_are_refused(tink, home, days):
    code, _, err = tink("audit", "lost-time", "--home", home.root, "--days", days)
    assert code == 2
    assert "must be a whole number, 1 or more" in err


def test_of_a_journal_that_is_wrong_everywhere_only_some_is_named(tink, home, monkeypatch):
    monkeypatch.setattr(command, "SHOWN_PROBLEMS", 3)
    with written(home) as connection:
        events = connection.exec_driver_sql("SELECT count(*) FROM events").scalar_one()
        connection.exec_driver_sql("UPDATE events SET hash = NULL")
        connection.commit()
    code, out, _ = tink("journal", "verify", "--home", home.root)
    assert code == 1
    assert [line.split(" is not")[0] for line in out.splitlines()] == [
        *(f"event {seq}" for seq in (1, 2, 3)),
        f"and {events - 3} more",
        f"head {events}:",
    ]
    code, out, _ = tink("journal", "verify", "--home", home.root, "--json")
    assert len(json.loads(out)["problems"]) == 4
