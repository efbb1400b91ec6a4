"""Questions to the journal, and their answers as a table, CSV, JSON or Parquet."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import trio

from tink.cli import printing
from tink.cli.homes import readable_home
from tink.cli.options import add_home, positive
from tink.errors import StartupError, UserError
from tink.home import Home
from tink.journal.reader import open_journal
from tink.journal.sql import Answer, ask
from tink.logs import write_line
from tink.world import World

FORMATS = ("table", "csv", "json", "parquet")
CLEAR = "\x1b[H\x1b[2J"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of a command that calls `answer`."""
    add_home(parser)
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="how to print (default: by the name of --output, else table); in csv and json bytes are "
        "hexadecimal; parquet needs pip install 'tink[parquet]'",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write there, instead of to standard output"
    )
    parser.add_argument(
        "--max-rows",
        type=positive,
        default=1000,
        metavar="N",
        help="at most so many (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="stop after so long (default: %(default)g)",
    )
    parser.add_argument("--watch", type=_seconds, metavar="S", help="ask again every so many seconds")


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError("must be more than 0")
    return number


def answer(arguments: argparse.Namespace, query: str, judge: Callable[[Answer], int] = lambda _: 0) -> int:
    """Asks, and prints what is answered; returns the exit status: 1 if not all of it was printed, else what
    `judge` says of it. Raises UserError for a query that cannot be asked."""
    chosen = arguments.format or _named(arguments.output)
    if chosen == "parquet" and arguments.output is None and sys.stdout.isatty():
        raise UserError("parquet is not for a terminal: pass --output FILE")

    def tell(answered: Answer) -> int:
        return _tell(chosen, arguments.output, answered) or judge(answered)

    with readable_home(arguments.home) as home:
        question = partial(_ask, home, query, arguments.max_rows, arguments.seconds, World())
        if arguments.watch is None:
            return tell(question())
        return trio.run(_watch, question, tell, arguments.watch)


async def _watch(question: Callable[[], Answer], tell: Callable[[Answer], int], seconds: float) -> int:
    """Until Ctrl-C."""
    while True:
        answer = question()
        if sys.stdout.isatty():
            print(CLEAR, end="")
        tell(answer)
        sys.stdout.flush()
        await trio.sleep(seconds)


def _ask(home: Home, query: str, rows: int, seconds: float, world: World) -> Answer:
    with open_journal(home) as connection:
        return ask(connection, query, rows=rows, seconds=seconds, clock=world.monotonic)


def _tell(chosen: str, output: Path | None, answer: Answer) -> int:
    content = _WRITERS[chosen](answer)
    if output is not None:
        try:
            output.write_bytes(content)
        except OSError as error:
            raise StartupError(f"{output} cannot be written: {error.strerror}") from error
    elif chosen == "parquet":
        sys.stdout.buffer.write(content)
    else:
        sys.stdout.write(content.decode())
    if answer.cut is None:
        return 0
    write_line(answer.cut)
    return 1


def _named(output: Path | None) -> str:
    suffix = "" if output is None else output.suffix.lstrip(".")
    return suffix if suffix in FORMATS else "table"


# -- formats ----------------------------------------------------------------------------------------


def _table(answer: Answer) -> bytes:
    numbers = [
        index
        for index in range(len(answer.columns))
        if all(isinstance(row[index], (int, float, type(None))) for row in answer.rows)
    ]
    rows = [[printing.plain(_short(_plain(value))) for value in row] for row in answer.rows]
    return printing.listing([printing.plain(name) for name in answer.columns], rows, numbers).encode()


def _short(value: Any) -> Any:
    return printing.short(
        "" if value is None else f"{value:.12g}" if isinstance(value, float) else str(value)
    )


def _csv(answer: Answer) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(answer.columns)
    writer.writerows([_plain(value) for value in row] for row in answer.rows)
    return text.getvalue().encode()


def _json(answer: Answer) -> bytes:
    _check_names(answer)
    found = [dict(zip(answer.columns, map(_plain, row), strict=True)) for row in answer.rows]
    return printing.document(found).encode() + b"\n"


def _parquet(answer: Answer) -> bytes:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise StartupError("parquet needs pyarrow: pip install 'tink[parquet]'") from error
    _check_names(answer)
    columns = {}
    for index, name in enumerate(answer.columns):
        try:
            columns[name] = pyarrow.array([row[index] for row in answer.rows])
        except (pyarrow.ArrowException, OverflowError) as error:
            raise UserError(
                f"column {name} has values of several types: CAST it to one ({error})"
            ) from None
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return bytes(sink.getvalue())


def _check_names(answer: Answer) -> None:
    twice = next((name for name in answer.columns if answer.columns.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"two columns are called {twice}: give one another name with AS")


def _plain(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else value


_WRITERS: dict[str, Callable[[Answer], bytes]] = {
    "table": _table,
    "csv": _csv,
    "json": _json,
    "parquet": _parquet,
}
