"""How fast `tink replay state` makes the state from the events, and what it needs for that.

Makes a home with a long history and runs the command on it, as its users do, again and again. The baselines
are the driver's own reading of the same events, undecoded (the best that can be had), and for memory and
time a journal of next to no events.
"""

from __future__ import annotations

import argparse
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import NamedTuple

from tests.bench import history
from tests.bench.figures import Figure
from tink.home import Home

SUMMARY = "the state at the end of a long journal, folded from its events"


class Fold(NamedTuple):
    """One run of the command: `seconds`, `cpu` seconds of it, and at the most `rss` in MB."""

    seconds: float
    cpu: float
    rss: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--events", type=int, default=300_000, help="events in the journal (300000)")
    parser.add_argument("--runs", type=int, default=5, help="runs of each; the median counts (5)")
    parser.add_argument("--home", type=Path, help="keep the home here; one that is there is used again")


def run(arguments: argparse.Namespace) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory(prefix="tink-bench-") as folder:
        short, long = Home(Path(folder) / "short"), Home(arguments.home or Path(folder) / "long")
        history.write(short, wanted=1, open_jobs=0, until=time.time())
        if not long.journal.exists():
            history.write(long, wanted=arguments.events, open_jobs=0, until=time.time())
        with closing(sqlite3.connect(f"file:{long.journal}?mode=ro", uri=True)) as journal:
            (events,), (jobs,) = (
                journal.execute(f"SELECT count(*) FROM {name}").fetchone() for name in ("events", "jobs")
            )
            (model,) = journal.execute("SELECT model_id FROM models ORDER BY created_at LIMIT 1").fetchone()
        yield Figure("events", events, "events")
        # In turn: the machine may get slower or faster meanwhile.
        some = [(read(long), fold(long), fold(short), fold(long, model)) for _ in range(arguments.runs)]
        reads, longs, shorts, models = zip(*some, strict=True)
        seconds = median(one.seconds for one in longs)
        yield Figure("replay_events", events / seconds, "events/s", events / median(reads))
        for name, unit in (("seconds", "s"), ("cpu", "s"), ("rss", "MB")):
            found, base = (median(getattr(one, name) for one in of) for of in (longs, shorts))
            yield Figure(f"replay_{name}", found, unit, base)
        yield Figure("replay_model_seconds", median(one.seconds for one in models), "s", seconds)
        rss, base = (median(one.rss for one in of) for of in (longs, shorts))
        yield Figure("replay_bytes_per_job", (rss - base) * 1e6 / jobs, "B")


# The command, which then says what it has taken. (The kernel's own account of the memory of a process that
# has ended begins with what its parent had.)
COMMAND = """
import re, sys, time
from pathlib import Path
from tink.cli.main import main
status = main(sys.argv[1:])
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]
print(time.process_time(), peak, file=sys.stderr)
sys.exit(status)
"""


def fold(home: Home, model: str | None = None) -> Fold:
    """One run of the whole command, from its start to its end; of a model's part, if one is named."""
    options = ["--home", str(home.root), "--table", "models", "--max-rows", "1"]
    options += [] if model is None else ["--model", model]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "replay", "state", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    seconds = time.monotonic() - began
    if done.returncode:
        raise SystemExit(f"tink replay state failed:\n{done.stderr}")
    cpu, peak = done.stderr.split()
    return Fold(seconds, float(cpu), int(peak) * 1024 / 1e6)


def read(home: Home) -> float:
    """Seconds for the rows of all events, by the driver alone."""
    began = time.monotonic()
    with closing(sqlite3.connect(f"file:{home.journal}?mode=ro", uri=True)) as journal:
        for _ in journal.execute("SELECT * FROM events ORDER BY seq"):
            pass
    return time.monotonic() - began
