"""How long the journal takes to answer, with a long history: what is asked of each view, the questions of
`tink audit`, and those that must go through everything.

Makes a home with a long history and asks through the commands, as their users do: a process for each, from
its start to its end, with up to 1,000 rows as a table. The baseline is SQLite alone, the same rows of the
same question, undecoded. With --cold the file is not in memory when a question comes.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from statistics import median

from tests.bench import history
from tests.bench.figures import Figure
from tests.unit.journal.hot import Asked, hot, whole
from tink.audit.questions import QUESTIONS
from tink.home import Home

SUMMARY = "questions to a long journal: each view's, and those of tink audit"
# As the commands print by default; one more tells them that there are more.
ROWS = 1000
SECONDS = "600"
AUDIT = "tink audit "
# What is young: of an hour.
YOUNG_SECONDS = 3600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--events", type=int, default=10_000_000, help="events in the journal (10000000)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each; the median counts (3)")
    parser.add_argument("--home", type=Path, help="keep the home here; one that is there is used again")
    parser.add_argument("--cold", action="store_true", help="nothing of the file is in memory before a run")


def run(arguments: argparse.Namespace) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory(prefix="tink-bench-") as folder:
        home = Home(arguments.home or Path(folder) / "home")
        if not home.journal.exists():
            history.write(home, wanted=arguments.events, open_jobs=0, until=time.time())
        with closing(_opened(home)) as journal:
            asked = _about(journal)
            (events,) = journal.execute("SELECT max(seq) FROM events").fetchone()
            (jobs,) = journal.execute("SELECT max(rowid) FROM jobs").fetchone()
        yield Figure("events", events, "events")
        yield Figure("jobs", jobs, "jobs")
        yield Figure("journal_size", home.journal.stat().st_size / 1e6, "MB")
        before = _forget if arguments.cold else _nothing
        for slow, questions in (("slowest", hot(asked)), ("slowest_whole", whole())):
            slowest = 0.0
            for name, query in questions.items():
                command = _command(home, name, query, asked)
                # In turn: the machine may get slower or faster meanwhile.
                some = [
                    (_ask(home, command, before), _alone(home, query, before))
                    for _ in range(arguments.runs)
                ]
                found, alone = (median(seconds) for seconds in zip(*some, strict=True))
                slowest = max(slowest, found)
                yield Figure(name.replace(" ", "_"), found, "s", alone)
            yield Figure(slow, slowest, "s")


def _opened(home: Home) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{home.journal}?mode=ro", uri=True)


def _about(journal: sqlite3.Connection) -> Asked:
    """The model of the newest adapter version, which was sampled from, and its last step."""
    newest = "SELECT adapter_id, model_id, tenant, step FROM adapters ORDER BY rowid DESC LIMIT 1"
    adapter, model, tenant, step = journal.execute(newest).fetchone()
    (at,) = journal.execute("SELECT at FROM events ORDER BY seq DESC LIMIT 1").fetchone()
    return Asked(model, adapter, tenant, step, at - YOUNG_SECONDS)


def _command(home: Home, name: str, query: str, asked: Asked) -> list[str]:
    words = ["sql", query]
    if name.startswith(AUDIT):
        question = name.removeprefix(AUDIT)
        words = ["audit", question]
        for one in QUESTIONS[question].parameters:
            value = str(getattr(asked, one.name))
            words += [value] if one.default is None else [f"--{one.name}", value]
    return [*words, "--home", str(home.root), "--seconds", SECONDS]


def _ask(home: Home, words: list[str], before: Callable[[Home], None]) -> float:
    before(home)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tink.cli.main", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    seconds = time.monotonic() - began
    # 1: there were more rows than it prints.
    if done.returncode not in (0, 1):
        raise SystemExit(f"tink {' '.join(words)} failed:\n{done.stderr}")
    return seconds


def _alone(home: Home, query: str, before: Callable[[Home], None]) -> float:
    before(home)
    began = time.monotonic()
    with closing(_opened(home)) as journal:
        journal.execute(query).fetchmany(ROWS + 1)
    return time.monotonic() - began


def _forget(home: Home) -> None:
    """The kernel reads the file anew."""
    with home.journal.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _nothing(_: Home) -> None:
    pass
