"""What several commands' options are read by."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_home(parser: argparse.ArgumentParser, of: str = "the journal", default: Any = None) -> None:
    parser.add_argument(
        "--home", type=Path, default=default, help=f"folder of {of} (TINK_HOME; default ~/.tink)"
    )


def positive(text: str) -> int:
    """A whole number, 1 or more."""
    if not is_positive(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 1 or more")
    return int(text)


def is_positive(text: str) -> bool:
    return text.isascii() and text.isdigit() and 0 < int(text) < 10**9
