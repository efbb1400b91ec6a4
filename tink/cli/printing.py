"""How the commands print: a JSON document for programs, tables for people."""

from __future__ import annotations

import datetime
import math
import shutil
from collections.abc import Collection, Sequence
from typing import Any

import msgspec
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from tink.limits import CELL

# Where the output goes into a file or a pipe.
PIPE_COLUMNS = 200
# What a list of jobs needs for an id and the columns beside it. On a narrower terminal its lines run over:
# that can be read and copied from, and a column that is squeezed to nothing cannot.
LIST_COLUMNS = 150


_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def print_document(value: Any) -> None:
    """`value` as one JSON document. Its keys are part of the product."""
    print(document(value))


def document(value: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def console(least: int = 0) -> Console:
    """On standard output as it is now; colours only on a terminal that has not asked for none."""
    width = shutil.get_terminal_size((PIPE_COLUMNS, 24)).columns
    return Console(width=max(width, least), emoji=False, highlight=False)


def table(*columns: str, title: str | None = None, right: tuple[str, ...] = ()) -> Table:
    """Without lines, so that it can be cut and searched. Where there is no room the last column is folded,
    and no other."""
    made = Table(
        box=None, title=title, title_justify="left", title_style="bold", header_style="dim", pad_edge=False
    )
    for index, column in enumerate(columns):
        justify: Any = "right" if column in right else "left"
        made.add_column(column, justify=justify, overflow="fold", no_wrap=index < len(columns) - 1)
    return made


def facts() -> Table:
    """Names on the left, what they are on the right."""
    made = Table(box=None, show_header=False, pad_edge=False)
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    return made


def state(name: str) -> str:
    colours = {"done": "green", "running": "green", "ready": "green", "live": "green", "ok": "green"}
    colours |= {"warning": "yellow"}
    colours |= {"failed": "red", "crashed": "red", "broken": "red", "wrong": "red", "silent": "red"}
    return f"[{colours[name]}]{name}[/]" if name in colours else name


def text(value: object) -> str:
    """Whatever came from outside, on one line, with no control characters; `-` for nothing."""
    return escape(plain(value))


def plain(value: object) -> str:
    """The same where it is printed without rich."""
    if value is None or value == "":
        return "-"
    line = " ".join(str(value).split())
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def short(line: str) -> str:
    """What fits a cell."""
    return line if len(line) <= CELL else f"{line[: CELL - 1]}\N{HORIZONTAL ELLIPSIS}"


def wide(made: Table) -> str:
    """As wide as it is: a line that runs over can be read, a column that is cut off cannot."""
    here = console()
    endless = here.options.update(max_width=sum(CELL + 2 for _ in made.columns))
    here = console(Measurement.get(here, endless, made).maximum)
    with here.capture() as captured:
        here.print(made)
    return "".join(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def listing(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int]) -> str:
    """Such a table of plain texts, as `wide` gives it: rich would take seconds for a thousand rows.
    `right`: the indexes of the columns that stand there."""
    widths = [max(map(_cells, column)) for column in zip(columns, *rows, strict=True)]

    def line(texts: Sequence[str]) -> str:
        padded = []
        for index, (text, width) in enumerate(zip(texts, widths, strict=True)):
            space = " " * (width - _cells(text))
            padded.append(f"{space}{text}" if index in right else f"{text}{space}")
        return "  ".join(padded).rstrip()

    head = line(columns)
    here = console(cell_len(head))
    with here.capture() as captured:
        here.print(Text(head, style="dim"), soft_wrap=True)
    return "".join([captured.get(), *(f"{line(row)}\n" for row in rows)])


def _cells(text: str) -> int:
    """On a terminal, where some characters take two."""
    return len(text) if text.isascii() else cell_len(text)


def moment(seconds: float | None) -> str:
    """A time of the journal, as this machine's local time."""
    if seconds is None:
        return "-"
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def instant(seconds: float) -> str:
    """The same to the millisecond, as ISO 8601 has it, and rounded up: who gives it back means a time at
    which what happened then has happened."""
    moment = datetime.datetime.fromtimestamp(math.ceil(seconds * 1000) / 1000)
    return moment.isoformat(timespec="milliseconds")


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


def ago(seconds: float) -> str:
    """Roughly: one unit."""
    unit, size = next((unit for unit in _UNITS if seconds >= unit[1]), _UNITS[-1])
    return f"{max(0.0, seconds) // size:.0f} {unit} ago"


def size(count: int) -> str:
    """Bytes, to three digits."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"


def number(value: float | None) -> str:
    """Whole numbers with a comma at each thousand, others with four digits."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
