"""Which home a command is about."""

from __future__ import annotations

import os
from pathlib import Path

from tink.errors import StartupError
from tink.home import Home
from tink.settings import Settings


def find_home(option: Path | None) -> Home:
    """The home that --home or TINK_HOME names, else the default one. StartupError unless a journal is
    there."""
    # Of the other settings none matters to a reader, so none of them can be wrong.
    named = {"TINK_HOME": os.environ.get("TINK_HOME", "")}
    home = Home(Settings.load(named, home=option).home)
    advice = "pass --home DIR or set TINK_HOME; 'tink serve' makes a new one"
    if not home.root.exists():
        raise StartupError(f"there is no home {home.root}: {advice}")
    if not home.root.is_dir():
        raise StartupError(f"{home.root} is not a folder: {advice}")
    if not home.journal.is_file():
        raise StartupError(f"{home.root} has no journal: {advice}")
    return home
