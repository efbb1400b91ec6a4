"""The kill loop: two training runs go on while their server is killed again and again.

    tools/crashloop [--kills 20] [--seed 1] [--engine megatron]
    tools/crashloop --points [--engine megatron]
    tools/crashloop --kills 20 --database postgresql

A real `tink serve` with its embedded trainer (or, with --engine megatron, with one of two processes, which
torchrun starts) serves two models side by side, through the unmodified
`tinker` SDK: a supervised run and a reinforcement-learning run. Meanwhile the worker, the trainer or both
get a `kill -9`, as drawn from the seed: at random times, some of them while the kill before is still being
recovered from, and about a third at a crash point (TINK_CRASH_AT, tink/crash.py), where the process kills
itself. With --database postgresql the journal is in a server of its own, which is killed like the others
and started again at once; the worker, which nobody starts again for that, has to go on by itself. --points
goes through all crash points instead, one after the other. A killed worker (and a killed torchrun) is
started again at once, as a service manager would do it; a killed trainer is its worker's affair, or
torchrun's. Then the same runs are made undisturbed, with a new journal, and everything that the clients got
is compared.

The last line says it. `lost`: accepted jobs without exactly one end, and results that a client did not
get. `doubled`: jobs with two ends or two numbers, and optimizer steps that were applied twice.
`client_errors`: exceptions that reached the runs, and errors that the SDK logged. `max_abs_diff`: over all
losses, log-probabilities, sampled tokens and metrics. `recovery`: from a kill until both runs have had a
result again. The exit status is 1 if anything is lost, doubled, an error or different, or if a crash point
was not reached with --points.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import postgres
from tests.crash.judge import ClientErrors, Played, examine, judge, table
from tests.crash.killer import VICTIMS, WITH_DATABASE, Kill, Killer, Stuck, drawn, each_point
from tests.crash.runs import Run, both, say
from tests.crash.trainers import ENGINES, Trainer, points
from tests.live import LiveServer
from tests.postgres import PostgresServer
from tink.home import Home

# The server that the journals are in; None: they are in files.
Database = PostgresServer | None

# Short, so that there is often a snapshot to take and to put back.
SNAPSHOT_SECONDS = 0.3


def play(home: Home, engine: str, runs: list[Run], kills: list[Kill], database: Database) -> Played:
    """Both runs, with a server of their own, and the kills."""
    with serving(home, engine, len(kills)) as (server, trainer):
        for run in runs:
            run.start(server.url)
        killer = Killer(server, trainer, runs, database)
        if kills:
            killer.work(kills)
        killer.await_end()
    return Played(
        {name: values for run in runs for name, values in run.numbers.items()},
        examine(home),
        sum(run.error is not None for run in runs),
        list(zip(killer.done, killer.recoveries(), strict=True)),
    )


@contextmanager
def serving(home: Home, engine: str, kills: int) -> Iterator[tuple[LiveServer, Trainer]]:
    """A `tink serve` and its trainer, ready; they are gone afterwards."""
    server = LiveServer(
        home.root,
        TINK_DATABASE_URL=home.database_url,
        TINK_SNAPSHOT_SECONDS=str(SNAPSHOT_SECONDS),
        # A job that kills its trainer is given up after some attempts. Here it is never the job.
        TINK_MAX_ATTEMPTS=str(2 * kills + 3),
        TINK_TRAINER_ORPHAN_SECONDS="60",
        # Every start deletes what it may, while the rest begins to work again.
        TINK_RETENTION_HOURS="0",
    )
    trainer = ENGINES[engine](server)
    server.environment |= trainer.settings
    try:
        trainer.start()
        server.start()
        yield server, trainer
    finally:
        # Not to be interrupted: whoever presses Ctrl-C twice wants nothing left behind either.
        former = {
            number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)
        }
        server.close()
        trainer.stop()
        for number, handler in former.items():
            signal.signal(number, handler)


def loop(
    root: Path, engine: str, kills: list[Kill], seed: int, database: Database = None, *, strict: bool
) -> bool:
    """Prints the last line; True if all is as promised. `strict`: a crash point that was not reached is
    not. Raises Stuck."""
    logged = ClientErrors()
    began = time.monotonic()
    runs = both(seed)
    disturbed = play(_home(root / "disturbed", database), engine, runs, kills, database)
    say(f"{len(kills)} kills in {time.monotonic() - began:.0f} s; now undisturbed")
    # It takes seconds to make, and is the same.
    shutil.copytree(root / "disturbed" / "models", root / "undisturbed" / "models")
    again = both(seed, [run.made for run in runs])
    undisturbed = play(_home(root / "undisturbed", database), engine, again, [], database)
    count = sum(len(values) for values in undisturbed.numbers.values())
    line, well = judge(disturbed, undisturbed, logged.count)
    say(f"{time.monotonic() - began:.0f} s in all; {count} numbers compared\n{table(disturbed.kills)}")
    wanted = {kill.point for kill in kills if kill.point}
    missed = wanted - {done.point for done, _seconds in disturbed.kills}
    say(f"{len(wanted - missed)} of {len(wanted)} crash points" + "".join(f", not {one}" for one in missed))
    print(line, flush=True)
    return well and len(disturbed.kills) == len(kills) and not (strict and missed)


def _home(root: Path, database: Database) -> Home:
    return Home(root, "" if database is None else database.create_database())


@contextmanager
def _database(name: str) -> Iterator[Database]:
    if name == "sqlite":
        yield None
    else:
        with postgres.running() as server:
            yield server


def main() -> int:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="tools/crashloop",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--kills", type=int, default=20, help="default: %(default)s")
    which.add_argument("--points", action="store_true", help="every crash point once")
    parser.add_argument("--seed", type=int, default=1, help="of the kills and of both runs (%(default)s)")
    parser.add_argument(
        "--engine", choices=list(ENGINES), default="hf", help="of the training server (%(default)s)"
    )
    parser.add_argument(
        "--database",
        choices=("sqlite", "postgresql"),
        default="sqlite",
        help="where the journal is; a PostgreSQL server is killed as often as all others (%(default)s)",
    )
    options = parser.parse_args()
    if options.kills < 1:
        parser.error("--kills must be at least 1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    root = Path(tempfile.mkdtemp(prefix="tink-crashloop-"))
    for name in [name for name in os.environ if name.startswith(("TINK_", "USE_", "MEGATRON_"))]:
        del os.environ[name]
    # The user's Hugging Face cache is not ours to fill.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TINKER_TELEMETRY": "0", "HF_HOME": str(root / "hf")}
    status = 1
    try:
        reachable = points(options.engine)
        victims = VICTIMS if options.database == "sqlite" else WITH_DATABASE
        planned = (
            each_point(reachable)
            if options.points
            else drawn(options.kills, options.seed, reachable, victims)
        )
        with _database(options.database) as database:
            if loop(root, options.engine, planned, options.seed, database, strict=options.points):
                status = 0
    except Stuck as error:
        say(f"crashloop: {error}")
    except KeyboardInterrupt:
        say("crashloop: interrupted, and everything stopped")
        status = 130
    finally:
        if status == 1:
            say(f"crashloop: journals and logs are kept in {root}")
        else:
            shutil.rmtree(root, ignore_errors=True)
    sys.stdout.flush()
    sys.stderr.flush()
    # The SDK's threads would go on asking for a server that is gone.
    os._exit(status)


if __name__ == "__main__":
    main()
