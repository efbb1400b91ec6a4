"""`tink export`: a model's whole history in one file."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from tink.cli import printing
from tink.cli.homes import find_home
from tink.cli.options import add_home
from tink.home import Home
from tink.journal import queries
from tink.journal.recording import open_recording
from tink.logs import write_line
from tink.replay import bundle
from tink.replay.reach import reach, remains
from tink.settings import Settings
from tink.world import World

HELP = "a model's events, bodies and states in one file, for 'tink replay FILE'"
DESCRIPTION = """\
Writes all that a replay of a model needs into one file: its events with their
hashes, the bodies of its jobs, the saved states that it has loaded, and which
versions of what it ran on. 'tink replay FILE' works from it alone, on another
machine too, and so do the modes of 'tink replay', 'tink sql' and 'tink audit'
with --home FILE. The base model is not in it. The worker may run meanwhile."""
EPILOG = """\
examples:
  tink export MODEL run.tink
  tink export MODEL run.tink --redact     no prompts, no tokens: their lengths

exit status: 0; 2 if there is no such model, or the file cannot be written"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the id of the training run")
    parser.add_argument("file", metavar="FILE", type=Path, help="the file to write; it must not exist")
    add_home(parser)
    parser.add_argument(
        "--redact",
        action="store_true",
        help="leave prompts, tokens and numbers out, and keep their shapes: the training cannot be "
        "replayed from it, the state and its audit can",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    home = find_home(arguments.home)
    artifacts = Settings.load(os.environ, only=["TINK_ARTIFACTS"], home=home.root).artifact_root
    if not arguments.redact:
        _say_what_is_lost(home, artifacts, arguments.model)
    made = bundle.write(
        home, artifacts, arguments.model, arguments.file, redact=arguments.redact, now=World().now()
    )
    print(f"{arguments.file}: {printing.size(arguments.file.stat().st_size)}, {told(made)}")
    return 0


def _say_what_is_lost(home: Home, artifacts: Path, model_id: str) -> None:
    """Before it begins: what a replay of the file cannot do."""
    with open_recording(home) as recording:
        model = queries.model(recording.journal, model_id)
        found = None if model is None else reach(model, remains(recording, artifacts, model))
    if found is not None and found.because is not None:
        begins = "" if found.schedule is None else f"the training can be replayed {found.told}: "
        write_line(f"tink export: {begins}{found.because}")


def told(made: bundle.About) -> str:
    """What is in a bundle, in a line."""
    bodies = f"the shapes of {made.bodies:,} bodies" if made.redacted else f"{made.bodies:,} bodies"
    parts = [f"{made.events:,} events", bodies, f"{len(made.directories):,} saved states"]
    if made.pruned:
        parts.append(f"{made.pruned:,} bodies had been pruned")
    return ", ".join(parts)
