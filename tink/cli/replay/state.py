"""`tink replay state`: the journal's tables at any point, what differs between two, and the way there."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import closing, contextmanager

from tink.cli import printing
from tink.cli.homes import readable_home
from tink.cli.options import add_home, positive
from tink.cli.replay import tables
from tink.cli.replay.stepping import Conversation
from tink.domain import rows
from tink.errors import StartupError, UserError
from tink.home import Home
from tink.journal import store
from tink.journal.recording import Recording, open_recording
from tink.limits import STATE_ROWS
from tink.replay import points, state
from tink.replay.state import Scope
from tink.replay.steps import Walk, parse_breakpoint

HELP = "the journal's tables at any point, what differs between two, and the way there"
DESCRIPTION = """\
Makes the journal's tables (docs/journal.md) from its events, up to a point:
an event's number (4711), a time (2026-11-24T06:00, of this machine's zone if
it names none; @1764000000.5, seconds since the epoch) or 'end'. A time means
right behind the last event that is not later. With --diff: what differs between
two points. With --step: event by event, with what each of them changes."""
EPILOG = """\
examples:
  tink replay state --at 4711 --table jobs
  tink replay state --at 2026-11-24T06:00 --model ID --format json
  tink replay state --diff 4711 end --job ID
  tink replay state --step --break kind=job_failed model=ID
  printf 'c\\np models\\n' | tink replay state --step --break kind=diverged

The worker may run meanwhile, and is not disturbed; but while --step is at work,
the journal's -wal file grows by all that is written.

exit status: 0; 2 if there is no such journal, point, model or job"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_home(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--at", metavar="POINT", help="the point (default: end)")
    what.add_argument(
        "--diff", nargs=2, metavar=("A", "B"), help="what differs between two points, whichever is first"
    )
    what.add_argument(
        "--step", action="store_true", help="step by step, by commands from standard input ('h' lists them)"
    )
    parser.add_argument("--model", metavar="ID", help="of a model alone, its session and its samples")
    parser.add_argument("--job", metavar="ID", help="of a job alone, and of what it saved")
    parser.add_argument("--table", choices=rows.TABLES, metavar="NAME", help=f"one of {_names()}")
    parser.add_argument("--format", choices=("table", "json"), help="how to print (default: table)")
    parser.add_argument(
        "--max-rows",
        type=positive,
        metavar="N",
        help=f"of each table, the last so many (default: {STATE_ROWS}; json has all)",
    )
    parser.add_argument(
        "--from", dest="start", metavar="POINT", help="with --step: begin there (default: before event 1)"
    )
    parser.add_argument(
        "--break",
        dest="breaks",
        nargs="+",
        action="extend",
        metavar="WHAT=VALUE",
        help="with --step: where 'c' stops: model=ID, job=ID or kind=KIND",
    )
    parser.set_defaults(run=run)


def _names() -> str:
    return ", ".join(rows.TABLES)


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    scope = Scope(model=arguments.model, job=arguments.job, table=arguments.table)
    with readable_home(arguments.home) as home, _whole(home), open_recording(home) as recording:
        journal = _Journal(home, recording)
        if arguments.step:
            _step(journal, arguments)
        elif arguments.diff:
            _diff(journal, scope, arguments)
        else:
            _state(journal, scope, arguments)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """UserError for options that do not go together: none is passed over in silence."""
    if not arguments.step:
        if arguments.start is not None or arguments.breaks is not None:
            raise UserError("--from and --break are for --step")
        if arguments.max_rows is not None and (arguments.diff or arguments.format == "json"):
            raise UserError("--max-rows is for a state in tables: the rest is printed whole")
        return
    others = {"--model": "model", "--job": "job", "--table": "table", "--format": "format"}
    for option, name in {**others, "--max-rows": "max_rows"}.items():
        if getattr(arguments, name) is not None:
            raise UserError(f"--step takes --from and --break, not {option}")


class _Journal:
    """A recording whose points have names."""

    def __init__(self, home: Home, recording: Recording) -> None:
        found = store.span(recording.journal)
        if found is None:
            raise UserError(f"{home.root} has no events yet")
        self.recording, self.span = recording, found

    def seq(self, point: str) -> int:
        """UserError for what is none."""
        seq = points.resolve(
            points.parse(point),
            self.span,
            lambda at: store.seq_at(self.recording.journal, at),
            printing.instant,
        )
        return store.last_seq(self.recording.journal, seq)  # which may be left out of a bundle

    def at(self, seq: int) -> float:
        return store.event_of(self.recording.journal, seq).at

    def place(self, seq: int) -> str:
        return f"event {seq} of {self.span.last}, {printing.instant(self.at(seq))}"


@contextmanager
def _whole(home: Home) -> Iterator[None]:
    """An event that cannot be read, as the one line that tells of it."""
    try:
        yield
    except LookupError as error:
        raise StartupError(f"{home.root} is damaged: {error}; 'tink db check' tells more") from error


def _state(journal: _Journal, scope: Scope, arguments: argparse.Namespace) -> None:
    seq = journal.seq(arguments.at or "end")
    found = state.select(state.at(journal.recording, scope, seq), scope, seq)
    if arguments.format == "json":
        printing.print_document({"seq": seq, "at": journal.at(seq), "tables": found})
        return
    print(f"behind {journal.place(seq)}")
    for table, some in found.items():
        if some:
            print()
            tables.print_rows(table, some, arguments.max_rows or STATE_ROWS)
    if not any(found.values()):
        print("no rows")


def _diff(journal: _Journal, scope: Scope, arguments: argparse.Namespace) -> None:
    old, new = map(journal.seq, arguments.diff)
    found = state.difference(journal.recording, scope, old, new)
    told = tables.document(found)
    if arguments.format == "json":
        ends = {name: {"seq": seq, "at": journal.at(seq)} for name, seq in (("from", old), ("to", new))}
        printing.print_document({**ends, **told})
        return
    print(f"from {journal.place(old)}")
    print(f"to   {journal.place(new)}")
    print(", ".join(f"{len(some)} {name}" for name, some in told.items()))
    tables.print_differences(found)


def _step(journal: _Journal, arguments: argparse.Namespace) -> None:
    breaks = [parse_breakpoint(text) for text in arguments.breaks or ()]
    with closing(Walk(journal.recording, journal.span.last)) as walk:
        if arguments.start is not None:
            walk.go(journal.seq(arguments.start))
        Conversation(walk, breaks, journal.seq, journal.place).run()
