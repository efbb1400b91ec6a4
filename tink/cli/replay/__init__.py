"""`tink replay`: what happened, once more."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

HELP = "go through what happened again: the state, the decisions, the training"
DESCRIPTION = """\
Reads a journal and does what it says once more, without touching it: its worker
may run meanwhile."""
EPILOG = """\
examples:
  tink replay state --at 4711            the tables as they were behind event 4711
  tink replay state --diff 4711 end      what has changed since
  tink replay decisions                  would this Tink decide as that one did?
  tink replay train MODEL                the training, compared with what it gave
  tink replay run.tink                   all of that, from a file of 'tink export'
  tink replay train MODEL --to 40 --output DIR    the adapter as it was after step 40

exit status: 0; 1 if something is not as it was; 2 if there is no such journal,
or it cannot be replayed

'tink replay MODE --help' has the options and examples."""

# Each is a module here with HELP, DESCRIPTION, EPILOG and add_arguments.
MODES: tuple[str, ...] = ("state", "decisions", "train", "file")


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """`tink replay FILE` is short for `tink replay file FILE`; a file named as a mode is not meant."""
    if arguments and arguments[0] not in MODES and Path(arguments[0]).is_file():
        return ["file", *arguments]
    return [*arguments]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    modes = parser.add_subparsers(dest="mode", required=True, metavar="MODE", title="modes", help="one of")
    for name in MODES:
        module = import_module(f"tink.cli.replay.{name}")
        mode = modes.add_parser(
            name,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(mode)
