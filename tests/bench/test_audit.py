"""The bench asks each question there is, through the command and alone, and each has an answer."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

import pytest

from tests.bench import audit
from tests.unit.journal.hot import Asked, hot, whole
from tink.audit.questions import QUESTIONS
from tink.journal.views import VIEWS


@pytest.mark.slow
def test_the_bench_gives_a_figure_for_each_question(tmp_path: Path) -> None:
    parser = ArgumentParser()
    audit.add_arguments(parser)
    options = ["--events", "2000", "--runs", "1", "--home", str(tmp_path / "home"), "--cold"]
    found = {figure.name: figure for figure in audit.run(parser.parse_args(options))}
    asked = [name.replace(" ", "_") for name in (*hot(Asked()), "slowest", *whole(), "slowest_whole")]
    assert list(found) == ["events", "jobs", "journal_size", *asked]
    assert all(figure.value > 0 for figure in found.values())


def test_each_view_and_each_question_of_tink_audit_is_asked() -> None:
    asked = hot(Asked())
    assert all(any(f"FROM {view}" in query for query in asked.values()) for view in VIEWS)
    assert {f"tink audit {name}" for name in QUESTIONS} <= asked.keys()
