"""`tink db`: the journal's databases, brought to the newest schema or checked."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.progress import TimeRemainingColumn

from tink.cli import printing
from tink.cli.homes import find_home, moving_homes, place
from tink.cli.options import add_home
from tink.cli.progress import bar
from tink.errors import DatabaseInUse, StartupError
from tink.home import Home
from tink.journal import moves, revisions
from tink.journal.backups import back_up
from tink.journal.checks import Check, check
from tink.journal.copies import Advance
from tink.journal.database import database
from tink.journal.journal import prepare
from tink.journal.reader import open_snapshot
from tink.journal.revisions import SCHEMAS, Schema
from tink.world import World

HELP = "upgrade, check, move or back up the journal"
DESCRIPTION = """\
The journal's databases: journal.sqlite and bodies.sqlite in the home, or the
PostgreSQL database that TINK_DATABASE_URL names."""
EPILOG = """\
examples:
  tink db upgrade --home /srv/tink    before a new Tink starts ('serve' does it too)
  tink db check                       after a restore, or out of caution
  tink db check --quick --json        without reading every body again
  tink db move --to postgresql               from the home's files to where
                                             TINK_DATABASE_URL says
  tink db move --to sqlite                   and back
  tink db backup /backup/today        of the files, while the worker runs, too

exit status: 0; 1 if 'check' found something wrong; 2 if there is no such
journal, or it is in use; 3 if a database could not be written"""

UPGRADE = """\
Applies the migrations that the journal's databases lack, under the worker's
lock: it must not run. A migration is committed once all the tables were
compared with the events. 'tink serve' does the same when it starts."""
CHECK = """\
Reads everything and changes nothing: SQLite's own integrity check (a PostgreSQL
server keeps its own house: of it, that what it commits is safe), the schema
against the code, events without a gap, the tables against the fold of the
events, and every body against its hash. The worker may run meanwhile."""

MOVE = """\
Copies the journal and all bodies into another database, which must be empty,
compares both, and makes it the home's. No worker may run meanwhile, nor wait for
its turn. Every event keeps its number and its hash; the tables are made anew
from them. Files that were moved away are renamed, tables on a server are marked,
so that no worker goes on with them by mistake. A move that was interrupted has
changed nothing: run it again."""

BACKUP = """\
Copies the home's files into a new folder while the worker goes on, and checks
the copy. It is a home again, but for the artifacts: copy their folder after it.
A journal in PostgreSQL is backed up with its own tools."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", help="what to do")
    upgrading = actions.add_parser("upgrade", help="apply missing migrations", description=UPGRADE)
    _add_common(upgrading)
    upgrading.set_defaults(run=run_upgrade)
    checking = actions.add_parser("check", help="look for anything that is wrong", description=CHECK)
    _add_common(checking)
    checking.add_argument("--quick", action="store_true", help="do not read and hash every body again")
    checking.set_defaults(run=run_check)
    moving = actions.add_parser("move", help="into another database, verified", description=MOVE)
    _add_common(moving)
    moving.add_argument(
        "--to",
        required=True,
        metavar="sqlite|postgresql|URL",
        help="the home's files; the database that TINK_DATABASE_URL names; or another one, as "
        "postgresql+psycopg://USER@HOST/DATABASE with its password in PGPASSWORD or ~/.pgpass",
    )
    moving.add_argument(
        "--from",
        dest="source",
        metavar="sqlite|postgresql|URL",
        help="where it is now (default: TINK_DATABASE_URL unless it is --to, or what the home says)",
    )
    moving.set_defaults(run=run_move)
    backing = actions.add_parser("backup", help="copy the files, checked", description=BACKUP)
    _add_common(backing)
    backing.add_argument("folder", type=Path, metavar="DIR", help="the new folder")
    backing.set_defaults(run=run_backup)


def _add_common(parser: argparse.ArgumentParser) -> None:
    add_home(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")


def run_upgrade(arguments: argparse.Namespace) -> int:
    home = find_home(arguments.home)
    with contextlib.ExitStack() as stack:
        try:
            # The worker of a server's database may be on another machine: its lock there counts.
            if not home.database_url or home.root.is_dir():
                stack.enter_context(home.lock())
        except StartupError as error:
            raise StartupError(f"the worker is running: stop it first ({error})") from None
        before = _revisions(home)
        with _alone():
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


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    try:
        yield
    except DatabaseInUse as error:
        raise DatabaseInUse(f"a worker is running: stop it first, and those that wait ({error})") from None


def _revisions(home: Home) -> dict[Schema, str | None]:
    found: dict[Schema, str | None] = dict.fromkeys(SCHEMAS)
    for schema in SCHEMAS:
        one = database(home, schema)
        if one.exists():
            with open_snapshot(one) as connection:
                found[schema] = revisions.look(connection, schema).revision
    return found


def run_check(arguments: argparse.Namespace) -> int:
    home = find_home(arguments.home)
    found = []
    for part in check(home, quick=arguments.quick):
        found.append(part)
        if not arguments.json:
            _tell(part)
    ok = all(part.ok for part in found)
    if arguments.json:
        document: dict[str, Any] = {"home": str(home.root), "ok": ok, "checks": found}
        printing.print_document(document)
    elif ok:
        print(f"{home.root}: all is well")
    else:
        print(f"{home.root}: something is wrong; restore a backup, or keep a copy and ask")
    return 0 if ok else 1


def _tell(part: Check) -> None:
    console = printing.console()
    word = printing.state("ok" if part.ok else "wrong")
    console.print(f"{word:<4} {part.database} {part.name}: {printing.text(part.detail)}")
    for problem in part.problems:
        console.print(f"     {printing.text(problem)}")


def run_move(arguments: argparse.Namespace) -> int:
    source, target = moving_homes(arguments.home, arguments.source, arguments.to)
    with _alone():
        moved = moves.move(source, target, World(), _stage)
    events = moved.head.seq
    if arguments.json:
        document: dict[str, Any] = {
            "home": str(source.root),
            "from": place(source),
            "to": place(target),
            "copied": moved.copied,
            "events": events,
            "bodies": moved.bodies,
            "bytes": moved.bytes,
            "head": str(moved.head) if events else None,
            "kept": moved.kept,
            "seconds": moved.seconds,
        }
        printing.print_document(document)
        return 0
    if moved.copied:
        print(
            f"moved {events:,} events{_rate(events, moved.events_seconds)} and {moved.bodies:,} bodies, "
            f"{printing.size(moved.bytes)}{_rate(moved.bodies, moved.bodies_seconds)}, "
            f"in {printing.duration(moved.seconds)}; hashes, tables and bodies are the same"
        )
    else:
        print("all of it was there already: an earlier move has come to its end")
    if events:
        print(f"head   {moved.head}")
    print(f"now in {place(target)}")
    print(f"old    {moved.kept}, out of use")
    if target.database_url:
        print("set TINK_DATABASE_URL for 'tink serve'")
    else:
        print("unset TINK_DATABASE_URL")
    return 0


def _rate(count: int, seconds: float) -> str:
    return f" ({count / seconds:,.0f}/s)" if count and seconds else ""


@contextlib.contextmanager
def _stage(name: str, total: int) -> Iterator[Advance]:
    with bar(TimeRemainingColumn()) as progress:
        task = progress.add_task(name, total=total)
        yield lambda count: progress.advance(task, count)


def run_backup(arguments: argparse.Namespace) -> int:
    home = find_home(arguments.home)
    with bar(TimeRemainingColumn()) as progress:

        def told(name: str) -> Callable[[int, int], None]:
            task = progress.add_task(name, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        made = back_up(home, arguments.folder, told)
    found = list(check(Home(arguments.folder), quick=False))
    ok = all(part.ok for part in found)
    if arguments.json:
        document: dict[str, Any] = {
            "home": str(home.root),
            "folder": str(arguments.folder),
            "events": made.head.seq,
            "bytes": made.bytes,
            "head": str(made.head) if made.head.seq else None,
            "ok": ok,
            "checks": found,
        }
        printing.print_document(document)
        return 0 if ok else 1
    for part in found:
        if not part.ok:
            _tell(part)
    print(f"{arguments.folder}: {made.head.seq:,} events, {printing.size(made.bytes)}")
    if made.head.seq:
        print(f"head   {made.head}")
    print("all is well" if ok else "something is wrong in it: was it before? 'tink db check' says so")
    return 0 if ok else 1
