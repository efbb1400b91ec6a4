"""How the commands print: a JSON document for programs, tables for people."""

from __future__ import annotations

import datetime
import os
import shutil
import sys
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

# Wide enough for an id and the columns beside it, where the output goes into a file or a pipe.
PIPE_COLUMNS = 200


def print_document(value: Any) -> None:
    """`value` as one JSON document. Its keys are part of the product."""
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def console() -> Console:
    """On standard output as it is now; colours only on a terminal that has not asked for none."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPE_COLUMNS
    return Console(width=int(os.environ.get("COLUMNS") or width), emoji=False, highlight=False)


def table(*columns: str, title: str | None = None, right: tuple[str, ...] = ()) -> Table:
    """Without lines, so that it can be cut and searched. The first column is what the row is called: it
    is folded where there is no room, never shortened."""
    made = Table(
        box=None, title=title, title_justify="left", title_style="bold", header_style="dim", pad_edge=False
    )
    for index, column in enumerate(columns):
        justify: Any = "right" if column in right else "left"
        made.add_column(column, justify=justify, overflow="fold", no_wrap=0 < index < len(columns) - 1)
    return made


def facts() -> Table:
    """Names on the left, what they are on the right."""
    made = Table(box=None, show_header=False, pad_edge=False)
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    return made


def state(name: str) -> str:
    colours = {"done": "green", "running": "green", "ready": "green", "live": "green", "ok": "green"}
    colours |= {"failed": "red", "crashed": "red", "broken": "red", "wrong": "red", "silent": "red"}
    return f"[{colours[name]}]{name}[/]" if name in colours else name


def text(value: object) -> str:
    """Whatever came from outside, on one line, with no control characters; `-` for nothing."""
    if value is None or value == "":
        return "-"
    line = " ".join(str(value).split())
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line))


def moment(seconds: float | None) -> str:
    """A time of the journal, as this machine's local time."""
    if seconds is None:
        return "-"
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    seconds = max(0.0, seconds)
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    if seconds < 86400:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
    return f"{seconds // 86400:.0f} d {seconds % 86400 // 3600:.0f} h"


def number(value: float | None) -> str:
    """Whole numbers with a comma at each thousand, others with four digits."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
