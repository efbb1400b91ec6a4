"""The soak gives its figures, a worker of today passes it, and one that leaks does not."""

from __future__ import annotations

import re

import pytest

from tests.bench.figures import Figure
from tests.soak.__main__ import main
from tests.soak.report import BOUNDED, FLAT, MOST, broken

OVER_TIME = [
    *("rate", "accepted_p50", "accepted_p99", "ended_p50", "ended_p99", "cpu"),
    *("rss", "handles", "rows", "journal", "bodies", "directories"),
]
IN_TURN = [f"{name}_in_turn" for name in ("accepted_p50", "accepted_p99", "ended_p50", "ended_p99", "cpu")]
AT_THE_END = ["jobs", "sessions", "lost", "doubled", "open", "problems"]

# Of a run of seconds little is to be told but whether something is left behind each time.
SHORT = ["--at-once", "8", "--kept", "0.3", "--starts", "0"]


def test_a_short_soak_gives_each_figure_and_nothing_is_broken(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["--jobs", "600", "--rounds", "2", "--tolerance", "9", *SHORT])
    rows = capsys.readouterr().out.splitlines()
    names = [re.match(r"(\w+) [\d.,]+ \S+.*", row) for row in rows]
    assert [found and found[1] for found in names] == [*OVER_TIME, *IN_TURN, *AT_THE_END], rows
    assert status == 0
    told = dict(row.split(" ")[:2] for row in rows)
    assert int(told["jobs"].replace(",", "")) > 600
    assert (told["lost"], told["doubled"], told["problems"]) == ("0", "0", "0")


@pytest.mark.parametrize(
    ("mutant", "figure", "jobs"),
    [
        ("keeps-files", "handles", "500"),
        pytest.param("keeps-bytes", "rss", "1000", marks=pytest.mark.slow),
        pytest.param("keeps-rows", "rows", "2000", marks=pytest.mark.slow),
    ],
)
def test_a_leak_is_found(capsys: pytest.CaptureFixture[str], mutant: str, figure: str, jobs: str) -> None:
    arguments = ["--jobs", jobs, "--rounds", "0", "--tolerance", "0.6", "--mutant", mutant]
    assert main([*arguments, *SHORT]) == 1
    assert f"broken: {figure} has grown" in capsys.readouterr().out


@pytest.mark.parametrize("name", FLAT)
def test_what_must_be_flat_may_be_a_tenth_more(name: str) -> None:
    assert list(broken([Figure(name, 109.0, "ms", 100.0)], 0.1)) == []
    (line,) = broken([Figure(name, 111.0, "ms", 100.0)], 0.1)
    assert line == f"{name} has grown: {name} 111 ms (100, 1.11)"


@pytest.mark.parametrize("name", BOUNDED)
def test_what_comes_and_goes_may_not_be_twice_as_much(name: str) -> None:
    assert list(broken([Figure(name, 199.0, "rows", 100.0)], 0.1)) == []
    assert len(list(broken([Figure(name, 201.0, "rows", 100.0)], 0.1))) == 1


@pytest.mark.parametrize(("name", "most"), MOST.items())
def test_what_is_lost_or_late_is_told_whatever_it_is_compared_with(name: str, most: float) -> None:
    assert list(broken([Figure(name, most, "jobs", 9.0)], 0.1)) == []
    assert len(list(broken([Figure(name, most + 1, "jobs", 9.0)], 0.1))) == 1
