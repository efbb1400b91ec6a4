"""`tink replay decisions`: where today's code would act otherwise than a journal says."""

from __future__ import annotations

import argparse

import msgspec

from tink.cli import printing
from tink.cli.homes import find_home
from tink.cli.options import add_home
from tink.errors import StartupError
from tink.journal.recording import open_recording
from tink.limits import SHOWN_PROBLEMS
from tink.logs import configure_logs, write_line
from tink.replay.decisions.history import look
from tink.replay.decisions.replay import Report, replay

HELP = "would this Tink decide as the one did that wrote the journal?"
DESCRIPTION = """\
Puts the worker's own code before everything that a journal says it was asked
and answered, and compares what it decides with what was decided then: which
requests are refused and why, in which order jobs run, the numbers that they
get, what their ends bring about. No server is needed, and nothing is trained.
The state before each decision is the recorded one, so a difference is one, and
not the beginning of many."""
EPILOG = """\
examples:
  tink replay decisions                       before an upgrade: with the new Tink
  tink replay decisions --home /backup/home   of a copy of journal.sqlite and bodies.sqlite
  tink replay decisions --format json         for programs

exit status: 0; 1 if something would be decided otherwise; 2 if there is no such
journal, or it cannot be read"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_home(parser)
    parser.add_argument("--format", choices=("text", "json"), default="text", help="how to print")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    configure_logs("critical")  # the replayed worker has nothing to say to anybody
    home = find_home(arguments.home)
    try:
        with open_recording(home) as recording:
            history = look(recording)
            if history.lost:
                write_line(
                    f"tink replay: {len(history.lost):,} of {history.jobs:,} jobs cannot be replayed: "
                    "they are samples whose requests were pruned"
                )
            report = replay(recording, history)
    except LookupError as error:  # found at the first look, before anything is replayed
        raise StartupError(f"{home.root} is damaged: {error}; 'tink db check' tells more") from error
    if arguments.format == "json":
        printing.print_document(msgspec.to_builtins(report))
    else:
        _print(report)
    return 1 if report.differences else 0


def _print(report: Report) -> None:
    if report.differences:
        made = printing.table("SEQ", "JOB", "RECORDED", "TODAY", right=("SEQ",))
        for found in report.differences[:SHOWN_PROBLEMS]:
            cells = (found.subject, found.recorded, found.today)
            made.add_row(str(found.seq), *map(printing.text, cells))
        printing.console(printing.LIST_COLUMNS).print(made)
        if (more := len(report.differences) - SHOWN_PROBLEMS) > 0:
            print(f"... and {more:,} more: --format json has them all")
        print()
    left_out = sum(report.left_out.values())
    parts = [f"{report.compared:,} compared", f"{sum(report.given.values()):,} given"]
    parts += [f"{left_out:,} left out"] if left_out else []
    parts += [f"{report.skipped:,} of jobs that cannot be followed"] if report.skipped else []
    print(f"{report.events:,} events: {', '.join(parts)}")
    count = len(report.differences)
    print(f"{count:,} would be decided otherwise" if count else "all would be decided as they were")
