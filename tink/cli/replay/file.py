"""`tink replay FILE`: everything that can be replayed of a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path

from tink.cli import export, printing
from tink.cli.replay import train
from tink.limits import SHOWN_PROBLEMS
from tink.logs import write_line
from tink.replay import bundle

HELP = "all that a file of 'tink export' holds: tink replay FILE"
DESCRIPTION = """\
Says what is in a file that 'tink export' has written, holds each event against
its hash, and replays the training, compared with what was journaled. It needs
the extra hf, and the base model where it is not the built-in one."""
EPILOG = """\
examples:
  tink replay run.tink
  tink replay state --home run.tink --diff 40 end     so do state, train, sql and audit take it

exit status: 0 if everything is as it was; 1 if not; 2 if it cannot be read or
replayed"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="a file of 'tink export'")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    with bundle.opened(arguments.file) as home:
        found = bundle.about(home)
        assert found is not None, "it was looked at when it was opened"
        facts = printing.facts()
        facts.add_row("model", printing.text(found.model_id))
        facts.add_row("exported", f"{printing.moment(found.exported_at)} by Tink {found.version}")
        facts.add_row("holds", export.told(found))
        facts.add_row("journal", f"at head {found.head}")
        if found.trainer is not None:
            ran = found.trainer
            facts.add_row(
                "ran on", printing.text(f"{ran.base_model} ({ran.base_digest[:12]}), {ran.engine}")
            )
        printing.console().print(facts)
        problems = list(bundle.broken(home, found))
        for problem in problems[:SHOWN_PROBLEMS]:
            print(problem)
        print(f"{len(problems):,} events are not as they were" if problems else "each event has its hash")
        if found.redacted:
            write_line("tink replay: the bundle is redacted: its training cannot be replayed")
            return int(bool(problems))
        options = argparse.ArgumentParser()
        train.add_arguments(options)
        replayed = train.run(options.parse_args([found.model_id, "--home", str(home.root)]))
        return int(bool(problems)) or replayed
