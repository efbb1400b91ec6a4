"""Shows that a worker can run for weeks: half a million jobs, and is it as it was at the beginning?

    python -m tests.soak [OPTIONS]

Real: the worker's own code from Router to journal, in a process of its own, with real SQLite files that are
synced at every commit, and what its clients do, one session after the other: models are made (some of what
another one has saved), trained, sampled, saved by name and for samplers, unloaded; checkpoints are
overwritten, deleted and expire; sessions are finished.

Not real: the servers compute nothing (tests/null_servers.py), and without --http they are in the worker's
process. There is no HTTP side: clients ask the Router. Weeks are short: what retention keeps for one is
kept for --kept seconds; thirty times in that it makes a pass, and the worker forgets what has ended;
three hundred times it looks for checkpoints that have. Of the models that are gone the trainer's books
remember few. Nothing else is faster than it is.

A figure's baseline is the same of the first tenth of the jobs, after a warm-up. Times that are minutes
apart are also those of what else the machine had to do: so the worker, when it is old, is compared with a
new one, in turn (`..._in_turn`), and by that it is decided whether times have grown.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median

import msgspec

from tests.bench import recovery
from tests.bench.figures import Figure
from tests.soak import mutants, report
from tests.soak.process import SoakWorker, Turn, worker
from tests.soak.worker import Options
from tink.home import Home
from tink.logs import write_line

TENTHS, TURNS = 10, 200
# What a worker keeps has been replaced so often before anything is measured.
WARM_UPS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools/soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=500_000, help="jobs of the worker (500000)")
    parser.add_argument("--at-once", type=int, default=100, help="sessions that are open at a time (100)")
    parser.add_argument("--kept", type=float, default=20.0, help="seconds that stand for a week (20)")
    parser.add_argument("--http", action="store_true", help="servers in processes of their own, vLLM too")
    parser.add_argument("--rounds", type=int, default=10, help="turns of the old and the new worker (10)")
    parser.add_argument(
        "--starts", type=int, default=5, help="real starts at the end; the median counts (5)"
    )
    parser.add_argument("--tolerance", type=float, default=0.1, help="what may be more at the end (0.1)")
    parser.add_argument("--seed", type=int, default=1, help="of what the clients do (1)")
    parser.add_argument("--home", type=Path, help="keep the home here; it must not be there yet")
    parser.add_argument("--mutant", choices=sorted(mutants.ALL), help="with a leak, which must be found")
    chosen = parser.parse_args(arguments)
    figures = []
    for figure in run(chosen):
        figures.append(figure)
        print(figure, flush=True)
    broken = list(report.broken(figures, chosen.tolerance))
    for line in broken:
        print(f"broken: {line}")
    return 1 if broken else 0


def run(chosen: argparse.Namespace) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory(prefix="tink-soak-") as folder:
        old, new = chosen.home or Path(folder) / "old", Path(folder) / "new"
        options = Options(
            home=str(old),
            seed=chosen.seed,
            at_once=chosen.at_once,
            kept=chosen.kept,
            mutant=chosen.mutant,
        )
        with worker(options, http=chosen.http) as running:
            warm_up(running, chosen)
            tenths = soak(running, chosen.jobs // TENTHS)
            yield from report.over_time(tenths)
            fresh = msgspec.structs.replace(options, home=str(new), seed=chosen.seed + 1, mutant=None)
            with worker(fresh, http=chosen.http) as other:
                warm_up(other, chosen)
                turns = [
                    in_turn(number, running, other, chosen.jobs // TURNS) for number in range(chosen.rounds)
                ]
            if turns:
                yield from report.in_turn(*zip(*turns, strict=True))
            done = running.end()
        yield Figure("jobs", done.jobs, "jobs")
        yield Figure("sessions", done.sessions, "sessions")
        yield from once(Home(old), done.jobs)
        yield from restart(options, Home(new), chosen.starts)
        yield Figure("problems", problems(Home(old)), "problems")


def warm_up(running: SoakWorker, chosen: argparse.Namespace) -> None:
    seconds = 0.0
    while seconds < WARM_UPS * chosen.kept:
        seconds += running.work(chosen.jobs // TURNS).seconds


def soak(running: SoakWorker, jobs: int) -> list[Turn]:
    """The tenths, each of so many jobs."""
    tenths = []
    for number in range(1, TENTHS + 1):
        tenths.append(turn := running.work(jobs))
        rows = {name: count for name, count in turn.done.rows.items() if count}
        write_line(f"{number}/{TENTHS}: {turn.jobs / turn.seconds:.0f} jobs/s, {rows}, {turn.looks[-1]}")
    return tenths


def in_turn(number: int, old: SoakWorker, new: SoakWorker, jobs: int) -> tuple[Turn, Turn]:
    """Each is first as often as the other: the machine may get slower or faster meanwhile."""
    if number % 2:
        return old.work(jobs), new.work(jobs)
    later = new.work(jobs)
    return old.work(jobs), later


def once(home: Home, submitted: int) -> Iterator[Figure]:
    """Each job is there, and has ended well, and that once."""
    with closing(sqlite3.connect(home.journal)) as journal:
        ((jobs, done),) = journal.execute("SELECT count(*), sum(state = 'done') FROM jobs")
        ((ends, different),) = journal.execute(
            "SELECT count(*), count(DISTINCT job_id) FROM events WHERE kind = 'job_done'"
        )
    yield Figure("lost", submitted - done, "jobs")
    yield Figure("doubled", jobs - submitted + ends - different, "jobs")


def restart(options: Options, fresh: Home, starts: int) -> Iterator[Figure]:
    """Until the journal is open, in a new process; and until a real `tink serve` answers, which has its
    embedded trainer start beside it."""
    opened = []
    for home in (options.home, str(fresh.root)):
        with worker(msgspec.structs.replace(options, home=home)) as again:
            opened.append(again.opened)
    yield Figure("open", opened[0], "s", opened[1])
    old = Home(Path(options.home))
    took = [(recovery.start(old).seconds, recovery.start(fresh).seconds) for _ in range(starts)]
    if took:
        found, base = (median(some) for some in zip(*took, strict=True))
        yield Figure("serve", found, "s", base)


def problems(home: Home) -> int:
    """What `tink db check --quick` has found."""
    command = [sys.executable, "-m", "tink.cli.main", "db", "check", "--quick", "--json"]
    checked = subprocess.run([*command, "--home", str(home.root)], stdout=subprocess.PIPE, check=False)
    found = json.loads(checked.stdout)
    return len([problem for part in found["checks"] for problem in part["problems"]])


if __name__ == "__main__":
    sys.exit(main())
