"""`tink trainer`: the training server by itself, for a machine or a GPU of its own."""

from __future__ import annotations

import argparse
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

from tink.errors import StartupError
from tink.trainer import process

HELP = "run the training server by itself"
DESCRIPTION = """\
Runs the training server, which speaks tink-train/1 (docs/trainer-protocol.md).
'tink serve' starts and supervises one by itself; run this to look at it, or to
write another client of it. What it holds is a cache: the worker's journal is
the truth."""
EPILOG = """\
TINK_TRAINER_TOKEN: what callers must carry as a bearer token; needed to listen
beyond loopback.

examples:
  tink trainer --port 8500
  tink trainer --model Qwen/Qwen3-0.6B --dtype bfloat16 --threads 4

exit status: 0 after SIGTERM; 2 if it cannot start"""

# Of the extra `hf`, by the name that is imported.
NEEDED = ("torch", "transformers", "safetensors", "tokenizers")
# What is handed on. The token comes by the environment: an option would show it to everyone.
OPTIONS = frozenset(field.name for field in fields(process.Options)) - {"token"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = process.parse([])
    parser.add_argument("--engine", choices=["hf"], default="hf", help="the engine (default: %(default)s)")
    parser.add_argument("--home", type=Path, default=default.home, help="default: %(default)s")
    parser.add_argument("--host", default=default.host, help="default: %(default)s")
    parser.add_argument("--port", type=int, default=default.port, help="0 (default): any free one")
    parser.add_argument("--artifacts", type=Path, help="default: artifacts under the home")
    parser.add_argument("--model", help="directory or hub name; default: the built-in tiny one")
    parser.add_argument("--model-name", help="the name it is served under; default: MODEL")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default=default.dtype,
        help="of the frozen base (default: %(default)s)",
    )
    parser.add_argument(
        "--slots",
        type=int,
        default=default.slots,
        help="models that compute at once (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=int, default=default.threads, help="of torch, for each (default: %(default)s)"
    )
    parser.add_argument("--ready-file", type=Path, help="written once the port is bound: pid, port")
    parser.add_argument(
        "--orphan-seconds",
        type=float,
        default=default.orphan_seconds,
        help="end when no worker has called for so long; 0 (default): never",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise StartupError(
            f"the engine 'hf' needs {', '.join(missing)}, not installed here: pip install 'tink[hf]'"
        )
    # Its own command line decides what the values mean, and reads TINK_TRAINER_TOKEN.
    given = {
        name: value for name, value in vars(arguments).items() if name in OPTIONS and value is not None
    }
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    try:
        return process.main(options)
    except* OSError as group:
        error = _first(group)
        raise StartupError(
            f"cannot serve on {arguments.host}, port {arguments.port}: {error.strerror or error}"
        ) from error


def _first(group: BaseExceptionGroup[OSError]) -> OSError:
    inner: BaseException = group
    while isinstance(inner, BaseExceptionGroup):
        inner = inner.exceptions[0]
    assert isinstance(inner, OSError)
    return inner
