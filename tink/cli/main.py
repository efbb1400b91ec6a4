"""The `tink` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import tink
from tink.cli import serve
from tink.errors import JournalUnavailable, TinkError, tink_error


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tink",
        description="A worker for LLM fine-tuning and RL that never loses a job and never repeats a step.",
    )
    parser.add_argument("--version", action="version", version=f"tink {tink.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serving = commands.add_parser("serve", help="run the worker", description=serve.__doc__)
    serve.add_arguments(serving)
    serving.set_defaults(run=serve.run)
    chosen = parser.parse_args(arguments)
    try:
        return int(chosen.run(chosen))
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
