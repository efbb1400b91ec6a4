"""What the end of a journal must have left in its tables: the check of every start."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from tink.domain.events import Record
from tink.domain.ledger import Ledger
from tink.domain.projection import Add, Insert, Key, Update, project

# (table, key) -> column -> value.
Written = dict[tuple[str, Key], dict[str, Any]]


def last_written(records: Iterable[Record]) -> Written:
    """What the last events of a journal must have left in its tables, whatever came before them: every
    column that they wrote, and did not only add to. LookupError if one of them makes a row that another
    has made."""
    written: Written = {}
    for record in records:
        for change in project(record):
            if isinstance(change, Update):
                written.setdefault((change.table, change.key), {}).update(change.values)
                continue
            if isinstance(change, Add):
                continue
            place = change.table, change.key
            if isinstance(change, Insert) and place in written:
                raise LookupError(f"event {record.seq} makes {change.table}{list(place[1])} anew")
            written[place] = msgspec.structs.asdict(change.row)
    return written


def missing(written: Written, stored: Ledger) -> Iterator[str]:
    """One line for each row in which `stored` has not what was written."""
    for (table, key), values in written.items():
        row = stored.tables[table].get(key)
        if row is None:
            yield f"{table}{list(key)} is not there"
            continue
        wrong = {column: value for column, value in values.items() if getattr(row, column) != value}
        if wrong:
            found = {column: getattr(row, column) for column in wrong}
            yield f"{table}{list(key)}: {wrong} is not {found}"
