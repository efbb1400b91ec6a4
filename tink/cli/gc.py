"""`tink gc`: what nothing needs any more goes now, or is told."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys

import msgspec
import trio

import tink
from tink.actors.artifacts import ArtifactFolder
from tink.actors.rehearsal import Placed, rehearse
from tink.actors.retention import Gone, Retention
from tink.cli import printing
from tink.cli.homes import find_home
from tink.cli.options import add_home
from tink.errors import StartupError
from tink.home import Home
from tink.journal.journal import Journal
from tink.journal.recording import Recording, open_recording
from tink.limits import NAMED, SHOWN_PROBLEMS
from tink.logs import configure_logs
from tink.replay import garbage
from tink.replay.garbage import Change, Garbage
from tink.settings import Settings
from tink.world import World

HELP = "delete what nothing needs any more, or say what that would be"
DESCRIPTION = """\
Deletes once, now, what a running worker deletes every hour: requests, results
and weights that nothing needs and whose time is over (TINK_RETENTION_HOURS and
TINK_KEEP_..., as they are set here), expired checkpoints, and what a crash has
left. What a redo needs stays however short these times are. With --dry-run it
only says what that would be, and which models could then not be replayed from
where they can be now; nothing is changed, and the worker may run meanwhile."""
EPILOG = """\
examples:
  tink gc --dry-run
  TINK_KEEP_REQUESTS_HOURS=0 tink gc --dry-run    with a shorter time: what would it make?
  tink gc                                         with the worker stopped
  tink gc --dry-run --json

The file of the bodies does not shrink: its free pages are used again.

exit status: 0; 2 if there is no such journal, or its worker runs, which does
this by itself; 3 if the journal could not be written"""

# Of each kind, what it is called.
NAMES = {
    "requests": "requests of jobs",
    "results": "results of jobs",
    "unnamed_bodies": "bodies that no job names",
    "adapters": "directories of sampler weights",
    "checkpoints": "directories of other checkpoints",
    "snapshots": "directories of snapshots",
    "unnamed_directories": "directories that no row names",
    "unfinished": "what was not written or removed to its end",
}


class Report(msgspec.Struct, kw_only=True):
    """`kept_hours`: by kind; null is for ever. `replays`: of models, where they can begin now, and then.
    `complete`: false if something waits for a sampling server that has it."""

    home: str
    dry_run: bool
    kept_hours: dict[str, float]
    garbage: Garbage
    replays: list[Change]
    complete: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_home(parser)
    parser.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    configure_logs("warning")
    home, world = find_home(arguments.home), World()
    settings = Settings.load(os.environ, home=home.root)
    if arguments.dry_run:
        report = _rehearse(home, settings, world)
        if not arguments.json:
            _print_replays(report)
    else:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(home.lock())
            except StartupError as error:
                raise StartupError(
                    f"the worker runs and does it every hour: 'tink gc --dry-run' says what ({error})"
                ) from None
            report = _rehearse(home, settings, world)
            if not arguments.json:  # what a replay loses is said before it is lost
                _print_replays(report)
                sys.stdout.flush()
            gone, complete = trio.run(_clean, home, settings, world)
            with open_recording(home) as recording:
                found = garbage.sort(recording, gone)
            report = msgspec.structs.replace(report, dry_run=False, garbage=found, complete=complete)
    if arguments.json:
        printing.print_document(report)
    else:
        _print(report)
    return 0


def _rehearse(home: Home, settings: Settings, world: World) -> Report:
    artifacts = settings.artifact_root

    def look(recording: Recording, gone: list[Gone]) -> tuple[Garbage, list[Change]]:
        return garbage.sort(recording, gone), garbage.changes(recording, artifacts, gone)

    (found, replays), complete = trio.run(rehearse, home, artifacts, settings.kept, world, look)
    return Report(
        home=str(home.root),
        dry_run=True,
        kept_hours={name: seconds / 3600 for name, seconds in settings.kept._asdict().items()},
        garbage=found,
        replays=replays,
        complete=complete,
    )


async def _clean(home: Home, settings: Settings, world: World) -> tuple[list[Gone], bool]:
    """What went, and whether that is all that nothing needs. The caller holds the home's lock."""
    gone: list[Gone] = []
    opened = Journal.open(home, world, version=tink.__version__, settings_digest=settings.digest)
    async with opened as journal:
        retention = Retention(
            journal,
            ArtifactFolder(settings.artifact_root, world),
            world,
            kept=settings.kept,
            servers=await journal.read(Placed.of),
            tell=gone.append,
        )
        return gone, await retention.once()


def _print_replays(report: Report) -> None:
    hours = {
        name: "for ever" if math.isinf(kept) else f"{kept:g} h" for name, kept in report.kept_hours.items()
    }
    facts = printing.facts()
    facts.add_row("home", printing.text(report.home))
    facts.add_row("kept", ", ".join(f"{name} {kept}" for name, kept in hours.items()))
    console = printing.console(printing.LIST_COLUMNS)
    console.print(facts)
    console.print()
    for one in report.replays[:SHOWN_PROBLEMS]:
        model = printing.text(one.model_id)
        console.print(f"{model} can be replayed {one.now} now, and then {one.then}", soft_wrap=True)
    if (more := len(report.replays) - SHOWN_PROBLEMS) > 0:
        console.print(f"and {more:,} models more begin elsewhere: --json has them all")
    if not report.replays:
        console.print("each model can be replayed then from where it can be now")
    console.print()


def _print(report: Report) -> None:
    console = printing.console()
    found = report.garbage
    amounts = {name: amount for name, amount in found.amounts.items() if amount.count}
    if amounts:
        table = printing.table(
            "WOULD GO" if report.dry_run else "GONE", "COUNT", "BYTES", right=("COUNT", "BYTES")
        )
        for name, amount in amounts.items():
            table.add_row(NAMES[name], printing.number(amount.count), printing.size(amount.bytes))
        console.print(table)
    else:
        console.print("nothing would go" if report.dry_run else "there was nothing to delete")
    for what, ended in (("checkpoints expired", found.expired), ("adapter versions ended", found.given_up)):
        if ended:
            more = len(ended) - NAMED
            named = ", ".join(map(printing.text, ended[:NAMED]))
            console.print(f"{what}: {named}" + (f" and {more:,} more" if more > 0 else ""), soft_wrap=True)
    if not report.complete:
        console.print("more goes once the worker runs: sampling servers may have it")
