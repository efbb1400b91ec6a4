"""Which home a command is about."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tink.errors import StartupError, UserError
from tink.home import Home
from tink.journal.database import database
from tink.settings import Settings


@contextmanager
def readable_home(option: Path | None) -> Iterator[Home]:
    """What `find_home` finds; or, if the option names a file of 'tink export', the home that is in it."""
    if option is not None and option.is_file():
        from tink.replay import bundle  # few have one, and it takes a while

        with bundle.opened(option) as home:
            yield home
    else:
        yield find_home(option)


def find_home(option: Path | None) -> Home:
    """The home that --home or TINK_HOME names, else the default one. StartupError unless a journal is
    there, or in the PostgreSQL database that TINK_DATABASE_URL names or the home's worker has noted."""
    home = _named_home(option)
    if not home.database_url:
        home = Home(home.root, home.noted_database() or "")
    if home.database_url:
        if not database(home, "journal").exists():
            raise StartupError(f"{place(home)} has no journal: 'tink serve' makes one")
        return home
    advice = "pass --home DIR or set TINK_HOME; 'tink serve' makes a new one"
    if not home.root.exists():
        raise StartupError(f"there is no home {home.root}: {advice}")
    if not home.root.is_dir():
        raise StartupError(f"{home.root} is not a folder, and this needs a whole home: {advice}")
    if not home.journal.is_file():
        raise StartupError(f"{home.root} has no journal: {advice}")
    return home


def moving_homes(option: Path | None, origin: str | None, goal: str) -> tuple[Home, Home]:
    """The same home as it is now, and as it will be when its journal is moved: each with `sqlite` or the
    URL of its database. UserError if they are one; StartupError for what is no home with a journal."""
    home = _named_home(option)
    root, named = home.root, home.database_url
    target = Home(root, "" if goal == FILES else _with_password(goal, named))
    if origin is None:
        source = _source(home, target)
    else:
        source = Home(root, "" if origin == FILES else _with_password(origin, named))
    if place(source) == place(target):
        raise UserError(f"the journal is in {place(source)} already")
    if not root.is_dir():
        raise StartupError(f"there is no home {root}: pass --home DIR or set TINK_HOME")
    if source.bundle.exists():
        raise UserError(f"{root} is no whole journal: it came out of a bundle")
    if not database(source, "journal").exists():
        raise StartupError(f"{place(source)} has no journal: --from says where it is")
    return source, target


def place(home: Home) -> str:
    """Where its journal is, for people; without a password."""
    return database(home, "journal").place


# What --to and --from call the files of the home, and the database that TINK_DATABASE_URL names: a password
# on a command line is for everybody to see.
FILES, SERVER = "sqlite", "postgresql"


def _source(home: Home, target: Home) -> Home:
    """Where the journal is now. TINK_DATABASE_URL may say already where it will be; and a home may, if a
    move was interrupted."""
    for url in (home.database_url, home.noted_database() or ""):
        if url and place(Home(home.root, url)) != place(target):
            return Home(home.root, url)
    return Home(home.root)


def _with_password(url: str, known: str) -> str:
    """The URL that is known, if it is the same database: it may have a password."""
    from tink.journal.postgres import shown  # an extra

    if url == SERVER:
        if not known:
            raise UserError(f"{SERVER} is the database that TINK_DATABASE_URL names, and it names none")
        return known
    return known if known and shown(url) == shown(known) else url


def _named_home(option: Path | None) -> Home:
    only = "TINK_HOME", "TINK_DATABASE_URL"
    return Settings.load(os.environ, only=only, home=option).home_folder
