"""`tink journal`: what the journal's own evidence says of it."""

from __future__ import annotations

import argparse
from itertools import islice

from tink.cli import printing
from tink.cli.homes import find_home
from tink.cli.options import add_home
from tink.journal import chain
from tink.journal.chain import Head
from tink.journal.reader import open_journal
from tink.limits import SHOWN_PROBLEMS

HELP = "has anybody changed the journal?"
DESCRIPTION = """\
Each event carries a hash over itself and the event before it: a row that was
changed, removed or moved shows. The worker may run meanwhile."""
EPILOG = """\
examples:
  tink journal verify
  tink journal verify --head 4711:5f1d...   what was printed some other day

exit status: 0 if all is as it was written; 1 if not; 2 if there is no such
journal"""

VERIFY = """\
Follows the chain of hashes through all events, names each that is not what was
written, and prints the head: the last event's number and hash. Who can write
the file can also make a new chain, or cut off its end: note the head from time
to time, in another place, and give it to --head."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(
        dest="action", required=True, metavar="ACTION", title="actions", help="what to do"
    )
    verify = commands.add_parser(
        "verify",
        help="follow the hashes from the first event to the last",
        description=VERIFY,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_home(verify)
    verify.add_argument("--head", metavar="SEQ:HASH", help="a head that was noted: it must be in the chain")
    verify.add_argument("--json", action="store_true", help="print JSON")
    verify.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    noted = None if arguments.head is None else Head.parse(arguments.head)
    home = find_home(arguments.home)
    with open_journal(home) as connection:
        breaks = chain.breaks(connection, noted)
        problems = list(islice(breaks, SHOWN_PROBLEMS))
        more = sum(1 for _ in breaks)
        head = chain.head(connection)
    if more:
        problems.append(f"and {more:,} more")
    if arguments.json:
        printing.print_document({"home": str(home.root), "head": str(head), "problems": problems})
        return int(bool(problems))
    for problem in problems:
        print(problem)
    if not problems:
        print(f"{head.seq:,} events, each as it was written")
    print(f"head {head}")
    return int(bool(problems))
