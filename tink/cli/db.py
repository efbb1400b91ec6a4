"""`tink db`: the journal's databases, brought to the newest schema or checked."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from tink.cli import printing
from tink.cli.homes import find_home
from tink.errors import StartupError
from tink.home import Home
from tink.journal import revisions
from tink.journal.checks import Check, check
from tink.journal.database import database
from tink.journal.journal import prepare
from tink.journal.reader import open_snapshot
from tink.journal.revisions import Schema

HELP = "upgrade the journal's schema, or check the journal"
DESCRIPTION = "The journal's databases (journal.sqlite and bodies.sqlite in the home)."
EPILOG = """\
examples:
  tink db upgrade --home /srv/tink    before a new Tink starts ('serve' does it too)
  tink db check                       after a restore, or out of caution
  tink db check --quick --json        without reading every body again

exit status: 0; 1 if 'check' found something wrong; 2 if there is no such
journal, or it is in use"""

UPGRADE = """\
Applies the migrations that the journal's databases lack, under the home's lock:
the worker must not run. A migration is committed once all the tables were
compared with the events. 'tink serve' does the same when it starts."""
CHECK = """\
Reads everything and changes nothing: SQLite's own integrity check, the schema
against the code, events without a gap, the tables against the fold of the
events, and every body against its hash. The worker may run meanwhile."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", help="what to do")
    upgrading = actions.add_parser("upgrade", help="apply missing migrations", description=UPGRADE)
    _add_common(upgrading)
    upgrading.set_defaults(run=run_upgrade)
    checking = actions.add_parser("check", help="look for anything that is wrong", description=CHECK)
    _add_common(checking)
    checking.add_argument("--quick", action="store_true", help="do not read and hash every body again")
    checking.set_defaults(run=run_check)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--home", type=Path, help="folder of the journal (TINK_HOME; default ~/.tink)")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")


def run_upgrade(arguments: argparse.Namespace) -> int:
    home = find_home(arguments.home)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(home.lock())
        except StartupError as error:
            raise StartupError(f"the worker is running: stop it first ({error})") from None
        before = _revisions(home)
        prepare(home)
        after = _revisions(home)
    if arguments.json:
        databases = {
            name: {"from": before[name], "to": after[name], "changed": before[name] != after[name]}
            for name in after
        }
        printing.print_document({"home": str(home.root), "databases": databases})
        return 0
    for name, revision in after.items():
        if before[name] == revision:
            print(f"{name}: at revision {revision}, nothing to do")
        else:
            print(f"{name}: {before[name] or 'new'} -> {revision}")
    return 0


def _revisions(home: Home) -> dict[Schema, str | None]:
    schemas: tuple[Schema, ...] = ("journal", "bodies")
    found: dict[Schema, str | None] = dict.fromkeys(schemas)
    for schema in schemas:
        one = database(home, schema)
        if one.exists():
            with open_snapshot(one) as connection:
                found[schema] = revisions.current(connection, schema)
    return found


def run_check(arguments: argparse.Namespace) -> int:
    home = find_home(arguments.home)
    found = []
    for part in check(home, quick=arguments.quick):
        found.append(part)
        if not arguments.json:
            _print(part)
    ok = all(part.ok for part in found)
    if arguments.json:
        document: dict[str, Any] = {"home": str(home.root), "ok": ok, "checks": found}
        printing.print_document(document)
    elif ok:
        print(f"{home.root}: all is well")
    else:
        print(f"{home.root}: something is wrong; restore a backup, or keep a copy and ask")
    return 0 if ok else 1


def _print(part: Check) -> None:
    console = printing.console()
    word = printing.state("ok" if part.ok else "wrong")
    console.print(f"{word:<4} {part.database} {part.name}: {printing.text(part.detail)}")
    for problem in part.problems:
        console.print(f"     {printing.text(problem)}")
