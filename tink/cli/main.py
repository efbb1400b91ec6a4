"""The `tink` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import tink
from tink.cli import db, jobs, serve, status, trainer
from tink.errors import JournalUnavailable, TinkError, tink_error

EPILOG = """\
examples:
  tink serve             a worker on http://127.0.0.1:8400, its data in ~/.tink
  tink status            what runs, what waits, what happened last
  tink jobs --failed     what failed, and why
  tink jobs show ID      one job, with its events
  tink db check          is the journal whole?

'tink COMMAND --help' has the options, the exit status and more examples.
Settings are environment variables; README.md lists them."""

# name -> help, description, epilog, add_arguments
COMMANDS: dict[str, tuple[str, str, str, Callable[[argparse.ArgumentParser], None]]] = {
    "serve": (serve.HELP, serve.DESCRIPTION, serve.EPILOG, serve.add_arguments),
    "status": (status.HELP, status.DESCRIPTION, status.EPILOG, status.add_arguments),
    "jobs": (jobs.HELP, jobs.DESCRIPTION, jobs.EPILOG, jobs.add_arguments),
    "db": (db.HELP, db.DESCRIPTION, db.EPILOG, db.add_arguments),
    "trainer": (trainer.HELP, trainer.DESCRIPTION, trainer.EPILOG, trainer.add_arguments),
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="tink",
        description="A worker for LLM fine-tuning and RL that never loses a job and never repeats a step.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"tink {tink.__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, (summary, description, epilog, add_arguments) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_arguments(command)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status. What a user did wrong is a line, never a traceback."""
    chosen = parser().parse_args(arguments)
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
            print(f"tink {chosen.command}: {line}", file=sys.stderr)
        # Fail-stop: what was acknowledged is safe, and a supervisor should start the worker again.
        return 3 if isinstance(cause, JournalUnavailable) else 2


if __name__ == "__main__":
    sys.exit(main())
