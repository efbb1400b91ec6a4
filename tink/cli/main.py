"""The `tink` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import tink
from tink.cli import replay
from tink.errors import JournalUnavailable, TinkError, tink_error
from tink.logs import write_line

EPILOG = """\
examples:
  tink serve             a worker on http://127.0.0.1:8400, its data in ~/.tink
  tink status            what runs, what waits, what happened last
  tink jobs --failed     what failed, and why
  tink jobs show ID      one job, with its events
  tink sql "SELECT ..."  any question to the journal
  tink audit usage       who used what; also lost time, lineage, steps
  tink replay train ID   a model's training once more: is it the same?
  tink db check          is the journal whole?
  tink gc --dry-run      what would leave the disk, and which replays end by it
  tink doctor            what is wrong here, and what mends it

'tink COMMAND --help' has the options, the exit status and more examples.
Settings are environment variables; 'tink config' prints them."""

# Each is a module here with HELP, DESCRIPTION, EPILOG and add_arguments.
COMMANDS = (
    *("serve", "config", "doctor", "status", "jobs"),
    *("sql", "audit", "journal", "replay", "export"),
    *("db", "gc", "trainer", "vllm"),
)


def parser(names: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="tink",
        description="A worker for LLM fine-tuning and RL that never loses a job and never repeats a step.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"tink {tink.__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name in names:
        module = import_module(f"tink.cli.{name}")
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status. What a user did wrong is a line, never a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["replay"]:
        arguments = ["replay", *replay.spelled_out(arguments[1:])]
    # The command that is named, and no other: a start should not wait for what `db` imports.
    chosen = parser(arguments[:1] if arguments[:1] and arguments[0] in COMMANDS else COMMANDS).parse_args(
        arguments
    )
    try:
        return int(chosen.run(chosen))
    except BrokenPipeError:
        # `tink jobs | head`: the reader has seen enough. Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (TinkError, BaseExceptionGroup) as error:
        cause = tink_error(error)
        if cause is None:
            raise
        for line in str(cause).splitlines():
            write_line(f"tink {chosen.command}: {line}")
        # Fail-stop: what was acknowledged is safe, and a supervisor should start the worker again.
        return 3 if isinstance(cause, JournalUnavailable) else 2


if __name__ == "__main__":
    sys.exit(main())
