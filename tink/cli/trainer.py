"""`tink trainer`: the training server by itself, for a machine or a GPU of its own."""

from __future__ import annotations

import argparse

from tink.trainer import options, process

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
  torchrun --nproc-per-node 2 -m tink.trainer --engine megatron
  torchrun --nproc-per-node 8 -m tink.trainer --engine megatron --pipeline-parallel 2

exit status: 0 after SIGTERM; 2 if it cannot start"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    return process.run(options.parsed(arguments))
