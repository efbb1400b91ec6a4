"""Which home a command is about."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tink.errors import StartupError
from tink.home import Home
from tink.journal.database import database
from tink.settings import Settings


@contextmanager
def readable_home(option: Path | None) -> Iterator[Home]:
    """The same; or, if the option names a file of 'tink export', the home that is in it."""
    if option is not None and option.is_file():
        from tink.replay import bundle  # few have one, and it takes a while

        with bundle.opened(option) as home:
            yield home
    else:
        yield find_home(option)


def find_home(option: Path | None) -> Home:
    """The home that --home or TINK_HOME names, else the default one. StartupError unless a journal is
    there, or in the PostgreSQL database that TINK_DATABASE_URL names or the home's worker has noted."""
    # Of the other settings none matters to a reader, so none of them can be wrong.
    named = {name: os.environ.get(name, "") for name in ("TINK_HOME", "TINK_DATABASE_URL")}
    home = Settings.load(named, home=option).home_folder
    if not home.database_url:
        home = Home(home.root, home.noted_database() or "")
    if home.database_url:
        if not database(home, "journal").exists():
            raise StartupError(f"{database(home, 'journal').place} has no journal: 'tink serve' makes one")
        return home
    advice = "pass --home DIR or set TINK_HOME; 'tink serve' makes a new one"
    if not home.root.exists():
        raise StartupError(f"there is no home {home.root}: {advice}")
    if not home.root.is_dir():
        raise StartupError(f"{home.root} is not a folder, and this needs a whole home: {advice}")
    if not home.journal.is_file():
        raise StartupError(f"{home.root} has no journal: {advice}")
    return home
