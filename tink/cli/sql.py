"""`tink sql`: a user's own questions to the journal."""

from __future__ import annotations

import argparse
import sys

from tink.cli import answers

HELP = "ask the journal in SQL, read-only"
DESCRIPTION = """\
Runs one SELECT over the journal (docs/journal.md has its tables and views) and
prints the answer. Nothing can be changed by it, no other file can be reached,
and it is stopped when it takes too long; the worker may run meanwhile, and is
not disturbed."""
EPILOG = """\
examples:
  tink sql "SELECT op, state, count(*) FROM jobs GROUP BY op, state"
  tink sql --format csv "SELECT step, loss_sum, grad_norm FROM v_steps WHERE model_id = 'ID'"
  tink sql --output steps.parquet "SELECT * FROM v_steps"
  tink sql --watch 2 "SELECT state, count(*) FROM jobs GROUP BY state"
  tink sql - < question.sql

exit status: 0; 1 if the answer had more rows than were printed; 2 if there is
no such journal, or it cannot be asked that"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("query", metavar="QUERY", help="one SELECT; '-' reads it from standard input")
    answers.add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    query = sys.stdin.read() if arguments.query == "-" else arguments.query
    return answers.answer(arguments, query)
