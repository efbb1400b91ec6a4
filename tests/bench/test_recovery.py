"""The bench runs, its journal is a whole one, and a start reads no more of that than it must."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from trio.testing import MockClock

from tests.bench import history
from tests.bench.figures import Figure
from tests.unit.journal.journal_kit import InlineWorld, opened
from tink.home import Home
from tink.journal import store
from tink.journal.sqlite import reader_engine

ROOT = Path(__file__).resolve().parents[2]
OPEN = 60


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> list[Home]:
    """One with twice the history of the other, and the same jobs open."""
    made = []
    for wanted in (6_000, 12_000):
        home = Home(tmp_path_factory.mktemp("bench") / "home")
        written = history.write(home, wanted=wanted, open_jobs=OPEN, until=InlineWorld().now())
        assert wanted <= written < wanted + 1_000
        made.append(home)
    return made


def _count(home: Home, table: str) -> int:
    with closing(sqlite3.connect(home.journal)) as journal:
        (found,) = journal.execute(f"SELECT count(*) FROM {table}").fetchone()
        return int(found)


def test_the_journal_that_is_measured_is_whole(homes: list[Home]) -> None:
    engine = reader_engine(homes[0].journal)
    with engine.connect() as connection:
        assert store.check(connection) == []
        stored = store.read_tables(connection)
    engine.dispose()
    assert all(stored.tables.values()), "every table has rows"
    states = Counter(job.state for job in stored.jobs.values())
    assert states["accepted"] + states["running"] == OPEN
    assert states["running"] > 0
    assert states["done"] > 1_500


class Reads(Counter[str]):
    """How many rows of each table are read, and how many events."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        read_rows, record = store.read_rows, store._record

        def counted(connection: Any, query: Any, kind: Any) -> Iterator[Any]:
            for row in read_rows(connection, query, kind):
                self[kind.__name__] += 1
                yield row

        def counted_event(row: Any) -> Any:
            self["event"] += 1
            return record(row)

        monkeypatch.setattr(store, "read_rows", counted)
        monkeypatch.setattr(store, "_record", counted_event)


async def test_a_start_reads_what_has_not_ended_however_much_has(
    autojump_clock: MockClock, homes: list[Home], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "CHECKED_EVENTS", OPEN // 2)
    found = []
    for home in homes:
        with pytest.MonkeyPatch.context() as patch:
            reads = Reads(patch)
            async with opened(home):
                found.append(reads)
        # Of these none has ended.
        for kind, table in (
            ("Sampler", "samplers"),
            ("Adapter", "adapters"),
            ("Checkpoint", "checkpoints"),
        ):
            assert reads.pop(kind) == _count(home, table)
    short, long = found
    assert short == long
    assert short["Job"] == OPEN
    assert short["event"] == OPEN // 2 + 1  # and the last trainer
    assert short["Snapshot"] == 2 * 2 * history.SIDE_BY_SIDE
    assert _count(homes[1], "events") > 1.9 * _count(homes[0], "events")


@pytest.mark.parametrize(
    ("figure", "row"),
    [
        (Figure("serve_seconds", 1.234, "s", 0.5), "serve_seconds 1.23 s (0.5, 2.47)"),
        (Figure("events", 300_032, "events"), "events 300,032 events"),
        (Figure("rss", 96.4, "MB", 0.0), "rss 96.4 MB (0, -)"),
    ],
)
def test_a_figure_is_a_row(figure: Figure, row: str) -> None:
    assert str(figure) == row


@pytest.mark.slow
def test_the_bench_prints_a_row_for_each_figure(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench", "recovery", "--events", "2000", "4000", "--open", "40"]
    done = subprocess.run(
        [*command, "--starts", "1"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    found = [
        re.match(r"(\w+) [\d.,]+ \S+( \([\d.,]+, [\d.]+\))?$", line) for line in done.stdout.splitlines()
    ]
    names = ("events_written", "serve_seconds", "serve_cpu", "serve_rss", "serve_slowest", "check_seconds")
    assert [row and row[1] for row in found] == [
        f"{events}_{name}" for events in (2000, 4000) for name in names
    ]
