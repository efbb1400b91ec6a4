"""`tink replay state --step`: a conversation on standard input and output, a command a line."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tink.cli.options import is_positive
from tink.cli.replay import tables
from tink.domain import rows
from tink.errors import UserError
from tink.limits import STATE_ROWS
from tink.replay.steps import Breakpoint, Step, Walk, parse_breakpoint

COMMANDS = """\
Enter, n [COUNT]  the next event, or so many
c                 go on to the next breakpoint
b WHAT=VALUE      a breakpoint more: model=ID, job=ID or kind=KIND; b alone lists them
d N               delete breakpoint N
p TABLE [KEY]     the rows of a table here, or one of them
g POINT           go to a point, backwards too: an event's number, a time, end
h                 this help
q                 quit"""
PROMPT = "> "


class Conversation:
    """`seq` finds a point, `place` describes one; they raise UserError. What is wrong in a command is a
    line of the conversation, which goes on."""

    def __init__(
        self,
        walk: Walk,
        breaks: list[Breakpoint],
        seq: Callable[[str], int],
        place: Callable[[int], str],
    ) -> None:
        self._walk, self._breaks = walk, breaks
        self._seq, self._place = seq, place
        self._commands: dict[str, Callable[[list[str]], None]] = {
            "n": self._next,
            "c": self._go_on,
            "b": self._break,
            "d": self._delete,
            "p": self._print,
            "g": self._go,
            "h": self._help,
        }

    def run(self) -> None:
        """Up to `q`, the end of the input, or Ctrl-C."""
        self._tell_place()
        try:
            while (words := _words()) is not None and words[0] != "q":
                self._obey(*words)
        except KeyboardInterrupt:
            print()

    def _obey(self, name: str, *words: str) -> None:
        try:
            if name not in self._commands:
                raise UserError(f"there is no command {name[:80]!r}: h lists them")
            self._commands[name](list(words))
        except UserError as error:
            print(error)

    # -- commands -----------------------------------------------------------------------------------

    def _next(self, words: list[str]) -> None:
        count = _number(words[0]) if words else 1
        for _ in range(count):
            step = self._walk.step()
            self._tell(step)
            if step is None:
                return

    def _go_on(self, words: list[str]) -> None:
        self._tell(self._walk.run(self._breaks))

    def _break(self, words: list[str]) -> None:
        if words:
            self._breaks.append(parse_breakpoint(" ".join(words)))
        for number, one in enumerate(self._breaks, 1):
            print(f"{number}  {one}")
        if not self._breaks:
            print("no breakpoints")

    def _delete(self, words: list[str]) -> None:
        number = _number(words[0]) if words else 0
        if not 1 <= number <= len(self._breaks):
            raise UserError("d takes the number of a breakpoint: b lists them")
        del self._breaks[number - 1]

    def _print(self, words: list[str]) -> None:
        table, *key = words or [""]
        found = self._walk.ledger.tables.get(table)
        if found is None:
            raise UserError(f"p takes a table: {', '.join(rows.TABLES)}")
        if not key:
            tables.print_rows(table, list(found.values()), STATE_ROWS)
            return
        some = [(known, row) for known, row in found.items() if [str(part) for part in known] == key]
        if not some:
            raise UserError(f"{table} has no row {' '.join(key)[:200]!r} here")
        for known, row in some:
            tables.print_row(table, known, row)

    def _go(self, words: list[str]) -> None:
        if len(words) != 1:
            raise UserError("g takes a point: an event's number, a time, or end")
        self._walk.go(self._seq(words[0]))
        self._tell_place()

    def _help(self, words: list[str]) -> None:
        print(COMMANDS)

    # -- what is told -------------------------------------------------------------------------------

    def _tell(self, step: Step | None) -> None:
        if step is None:
            print(f"the end: there is no event behind {self._walk.last}")
            return
        tables.print_event(step.record)
        tables.print_differences(step.changes, indent="    ")

    def _tell_place(self) -> None:
        if self._walk.seq:
            print(f"behind {self._place(self._walk.seq)}")
        else:
            print(f"before the first of {self._walk.last} events")


def _words() -> list[str] | None:
    """The next command; None at the end of the input."""
    asks = sys.stdin.isatty()
    try:
        return input(PROMPT if asks else "").split() or ["n"]
    except EOFError:
        if asks:
            print()  # after the prompt
        return None
    except UnicodeDecodeError:
        return ["\N{REPLACEMENT CHARACTER}"]


def _number(text: str) -> int:
    """UserError unless it is a whole number, 1 or more."""
    if not is_positive(text):
        raise UserError(f"{text[:80]!r} must be a whole number, 1 or more")
    return int(text)
