"""The chain of hashes through the events: each has a sha256 over that of the one before it and itself. A
row that is changed, removed or put elsewhere breaks it there. Whoever can write the file can also make a
whole new chain: against that, note the head now and then where he cannot write, and give it to `verify`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import Connection, Text, select, type_coerce

from tink.errors import UNREADABLE, UserError
from tink.journal import schema
from tink.limits import SCANNED_ROWS

# Before the first event.
START = bytes(32)
# Whole numbers up to here are the same as floats.
EXACT = 2**53

# What is hashed, in this order: what a journal says must not depend on how its database keeps it.
COLUMNS = (
    *("seq", "at", "incarnation", "kind"),
    *("tenant", "session_id", "model_id", "job_id", "adapter_id", "replica", "data"),
)
_TEXTS = tuple(name for name in COLUMNS if name not in ("seq", "at", "incarnation", "data"))
_ENCODER = msgspec.json.Encoder(order="sorted")


class Head(NamedTuple):
    """The last event and its hash: they stand for all that came before."""

    seq: int
    hash: bytes

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash.hex()}"

    @classmethod
    def parse(cls, text: str) -> Head:
        seq, _, digest = text.partition(":")
        try:
            found = cls(int(seq), bytes.fromhex(digest))
        except ValueError:
            found = cls(0, b"")
        if found.seq < 1 or len(found.hash) != len(START):
            raise UserError(f"{text[:200]!r} is no head: SEQ:HASH is, as 'tink journal verify' prints it")
        return found


# Of an empty journal.
NONE = Head(0, START)


def link(before: bytes, row: Mapping[str, Any]) -> bytes:
    """The hash of an event whose columns are in `row`, behind the one whose hash is `before`."""
    *head, data = (row[name] for name in COLUMNS)
    return hashlib.sha256(before + _ENCODER.encode([*head, canonical(data)])).digest()


def canonical(value: Any) -> Any:
    """The same for numbers that are the same: a database may give a 5 for a 5.0, and for a 1e30 all of its
    digits."""
    match value:
        case dict():
            return {name: canonical(part) for name, part in value.items()}
        case list():
            return [canonical(part) for part in value]
        case float():
            return int(value) if value.is_integer() and abs(value) < EXACT else value
        case int() if abs(value) >= EXACT:
            return float(value)
    return value


def head(connection: Connection) -> Head:
    """Of the whole journal; seq 0 if it is empty."""
    table = schema.events
    query = select(table.c.seq, table.c.hash).order_by(table.c.seq.desc()).limit(1)
    row = connection.execute(query).one_or_none()
    return NONE if row is None else Head(row.seq, _digest(row.hash))


def hash_of(connection: Connection, seq: int) -> bytes:
    table = schema.events
    return _digest(connection.execute(select(table.c.hash).where(table.c.seq == seq)).scalar())


def _digest(kept: Any) -> bytes:
    """What a row has as its hash; nothing if that is none."""
    return kept if isinstance(kept, bytes) else b""


def walk(
    events: Iterable[Mapping[str, Any]], before: Mapping[int, str] | None = None
) -> Iterator[tuple[Mapping[str, Any], Head, str | None]]:
    """Each event with its head, and why it cannot follow the one before it; None if it can. `before`: for
    those whose predecessors were left out on purpose, by their numbers, the predecessors' hashes (hex)."""
    last, left_out = NONE, before or {}
    for row in events:
        seq, kept, problem = int(row["seq"]), _digest(row["hash"]), None
        noted = left_out.get(seq)
        if noted is None and seq != last.seq + 1:
            problem = f"no events from {last.seq + 1} to {seq - 1}"
        elif link(last.hash if noted is None else bytes.fromhex(noted), row) != kept or not _is_plain(row):
            problem = f"event {seq} is not what was written behind event {seq - 1}"
        last = Head(seq, kept)
        yield row, last, problem


def breaks(connection: Connection, noted: Head | None = None) -> Iterator[str]:
    """One line for each place where the events are not what was written. `noted`: a head from earlier,
    which must be in the chain."""
    table = schema.events
    columns: list[Any] = [table.c[name] for name in (*COLUMNS, "hash")]
    if connection.dialect.name == "sqlite":  # as it stands there
        columns.append(type_coerce(table.c.data, Text).label("text"))
    last = NONE
    query = select(*columns).order_by(table.c.seq)
    found = False
    try:
        with connection.execute(query, execution_options={"yield_per": SCANNED_ROWS}) as read:
            for _, last, problem in walk(map(dict, read.mappings())):
                if problem is not None:
                    yield problem
                if noted is not None and last.seq == noted.seq:
                    found = True
                    if last != noted:
                        kept, wanted = last.hash.hex(), noted.hash.hex()
                        yield f"event {last.seq} has the hash {kept}, not the noted {wanted}"
    except UNREADABLE as error:
        yield f"an event behind {last.seq} cannot be read: {error}"
    if noted is not None and not found:
        yield f"event {noted.seq}, whose hash was noted, is not there: the last one is {last.seq}"


def _is_plain(row: Mapping[str, Any]) -> bool:
    """Whether SQL finds in the row what was hashed. Another one may have the same hash: with bytes, of
    which the text that was there is the base64, or with a key twice, of which SQLite takes the first."""
    texts = [row[name] for name in _TEXTS if row[name] is not None]
    texts.append(row.get("text", ""))
    if not all(isinstance(text, str) for text in texts):
        return False
    return texts[-1] in ("", msgspec.json.encode(row["data"]).decode()) or not _has_a_key_twice(texts[-1])


def _has_a_key_twice(text: str) -> bool:
    twice = False

    def look(pairs: list[tuple[str, Any]]) -> None:
        nonlocal twice
        twice |= len(dict(pairs)) < len(pairs)

    json.loads(text, object_pairs_hook=look)
    return twice
