"""How the modes print rows of the journal's tables, and what has changed in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
from rich.markup import escape

from tink.cli import printing
from tink.domain import rows
from tink.domain.events import Record
from tink.domain.ledger import Difference
from tink.domain.projection import Key
from tink.journal.store import event_row

# What is not worth a cell.
_NOTHING: tuple[object, ...] = (None, "", [], {})


def print_rows(table: str, found: list[rows.Row], most: int) -> None:
    """The last `most` of them, with the columns that say something."""
    if not found:
        print(f"{table}: 0")
        return
    shown = found[-most:]
    columns = [
        name
        for name in rows.TABLES[table][0].__struct_fields__
        if any(getattr(row, name) not in _NOTHING for row in shown)
    ]
    title = f"{table}: {len(found)}" + (f", the last {most}" if len(shown) < len(found) else "")
    made = printing.table(*columns, title=title, right=tuple(_numbers(columns, shown)))
    for row in shown:
        made.add_row(*(escape(_cell(name, getattr(row, name))) for name in columns))
    print(printing.wide(made), end="")


def _numbers(columns: list[str], shown: list[rows.Row]) -> Iterator[str]:
    for name in columns:
        if all(isinstance(getattr(row, name), int | float | None) for row in shown):
            yield name


def print_row(table: str, key: Key, row: rows.Row) -> None:
    """All of it."""
    print(_place(table, key))
    for name in row.__struct_fields__:
        print(f"  {name}: {_value(name, getattr(row, name))}")


def print_differences(found: Iterable[Difference], indent: str = "") -> None:
    """`+` made, `~` changed, `-` gone."""
    for one in found:
        place = _place(one.table, one.key)
        row = one.new or one.old
        if one.columns:
            print(f"{indent}~ {place}")
            for name, (old, new) in one.columns.items():
                print(f"{indent}    {name}: {_value(name, old)} -> {_value(name, new)}")
        elif row is not None:
            keys = rows.TABLES[one.table][1]
            values = {name: getattr(row, name) for name in row.__struct_fields__ if name not in keys}
            print(f"{indent}{'-' if one.new is None else '+'} {place}")
            print(f"{indent}    {_in_short(values)}")


def print_event(record: Record) -> None:
    row = event_row(record)
    print(f"{record.seq}  {printing.instant(record.at)}  {row['kind']}")
    subject = msgspec.structs.asdict(record.subject)
    for values in (subject, row["data"]):
        if line := _in_short(values):
            print(f"    {line}")


def document(found: list[Difference]) -> dict[str, list[dict[str, Any]]]:
    """For programs: the rows made, changed and gone."""
    made, changed, gone = [], [], []
    for one in found:
        place = {"table": one.table, "key": one.key}
        if one.old is None:
            made.append({**place, "row": one.new})
        elif one.new is None:
            gone.append({**place, "row": one.old})
        else:
            columns = {name: {"old": old, "new": new} for name, (old, new) in one.columns.items()}
            changed.append({**place, "columns": columns})
    return {"made": made, "changed": changed, "gone": gone}


def _place(table: str, key: Key) -> str:
    return f"{table} {' '.join(printing.plain(part) for part in key)}"


def _in_short(values: dict[str, Any]) -> str:
    return "  ".join(
        f"{name}={_cell(name, value)}" for name, value in values.items() if value not in _NOTHING
    )


def _cell(name: str, value: Any) -> str:
    return printing.short(_value(name, value))


def _value(name: str, value: Any) -> str:
    """All of it: two numbers that differ in a bit do not look the same."""
    if isinstance(value, dict | list):
        value = msgspec.json.encode(value).decode()
    elif isinstance(value, float):
        value = printing.instant(value) if name.endswith("_at") else repr(value)
    return printing.plain(value)
