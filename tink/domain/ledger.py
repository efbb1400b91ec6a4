"""The projections in memory: what the changes of events make of it, and how two of them differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from copy import copy
from typing import Any

import msgspec

from tink.domain import rows
from tink.domain.events import Record
from tink.domain.projection import KEYS, Add, Change, Insert, Key, Update, project

# table -> its place among them.
_ORDER = {table: place for place, table in enumerate(rows.TABLES)}


class Difference(msgspec.Struct, frozen=True):
    """A row of which two ledgers do not say the same. `old` is None where it is made, `new` where it is
    gone."""

    table: str
    key: Key
    old: rows.Row | None
    new: rows.Row | None

    @property
    def columns(self) -> dict[str, tuple[Any, Any]]:
        """What has changed in a row that is in both: column -> (old, new)."""
        if self.old is None or self.new is None:
            return {}
        both = (
            (name, getattr(self.old, name), getattr(self.new, name)) for name in self.old.__struct_fields__
        )
        return {name: (old, new) for name, old, new in both if old != new}

    def reversed(self) -> Difference:
        """The way back."""
        return Difference(self.table, self.key, self.new, self.old)


class Ledger:
    """The projections in memory: each table is primary key -> row."""

    def __init__(self) -> None:
        self.incarnations: dict[Key, rows.Incarnation] = {}
        self.sessions: dict[Key, rows.Session] = {}
        self.models: dict[Key, rows.Model] = {}
        self.jobs: dict[Key, rows.Job] = {}
        self.samplers: dict[Key, rows.Sampler] = {}
        self.adapters: dict[Key, rows.Adapter] = {}
        self.adapter_placements: dict[Key, rows.AdapterPlacement] = {}
        self.checkpoints: dict[Key, rows.Checkpoint] = {}
        self.snapshots: dict[Key, rows.Snapshot] = {}
        self.steps: dict[Key, rows.Step] = {}
        self.usage: dict[Key, rows.Usage] = {}
        # The same, by the tables' names.
        self.tables: dict[str, dict[Key, Any]] = {name: getattr(self, name) for name in rows.TABLES}
        # (model, kind, name) -> the checkpoint that lives there, or lived there last.
        self._addresses: dict[Key, rows.Checkpoint] = {}
        # By adapter version: a run makes one with each of its steps, and most of those are gone.
        self._samplers_of: defaultdict[str, list[rows.Sampler]] = defaultdict(list)
        # (tenant, idempotency key) -> the session that was made with it.
        self._sessions_of: dict[Key, rows.Session] = {}

    def checkpoint_at(self, model_id: str, kind: str, name: str) -> rows.Checkpoint | None:
        """The live checkpoint of that address."""
        found = self._addresses.get((model_id, kind, name))
        return found if found is not None and found.state == "live" else None

    def session_of(self, tenant: str, idempotency_key: str) -> rows.Session | None:
        return self._sessions_of.get((tenant, idempotency_key))

    def samplers_of(self, adapter_id: str) -> Iterable[rows.Sampler]:
        """Those of an adapter version, and of a session that is open."""
        return (one for one in self._samplers_of.get(adapter_id, ()) if self._is_open(one.session_id))

    def _is_open(self, session_id: str) -> bool:
        session = self.sessions.get((session_id,))
        return session is not None and session.state == "open"

    def put(self, table: str, row: rows.Row) -> None:
        self.tables[table][KEYS[table](row)] = row
        if isinstance(row, rows.Checkpoint):
            address = (row.model_id, row.kind, row.name)
            if row.state == "live" or address not in self._addresses:
                self._addresses[address] = row
        elif isinstance(row, rows.Sampler) and row.adapter_id is not None:
            self._samplers_of[row.adapter_id].append(row)
        elif isinstance(row, rows.Session) and row.idempotency_key is not None:
            self._sessions_of[row.tenant, row.idempotency_key] = row

    def forget(self, table: str, key: Key) -> rows.Row | None:
        """Takes a row out, and returns it."""
        row: rows.Row | None = self.tables[table].pop(key, None)
        if isinstance(row, rows.Checkpoint):
            address = (row.model_id, row.kind, row.name)
            if self._addresses.get(address) is row:
                del self._addresses[address]
        elif isinstance(row, rows.Sampler) and row.adapter_id is not None:
            samplers = self._samplers_of[row.adapter_id]
            samplers.remove(row)
            if not samplers:
                del self._samplers_of[row.adapter_id]
        elif isinstance(row, rows.Session) and row.idempotency_key is not None:
            del self._sessions_of[row.tenant, row.idempotency_key]
        return row

    def apply(self, changes: Iterable[Change]) -> None:
        for change in changes:
            if isinstance(change, Update):
                row = self.tables[change.table].get(change.key)
                if row is None or (change.open and row.ended):
                    raise LookupError(f"{change.table} has no {'open ' * change.open}row {change.key}")
                for column, value in change.values.items():
                    setattr(row, column, value)
            elif isinstance(change, Add) and (row := self.tables[change.table].get(change.key)) is not None:
                _add(row, change.row)
            elif isinstance(change, Insert) and change.key in self.tables[change.table]:
                raise LookupError(f"{change.table} has the row {change.key} already")
            else:
                self.put(change.table, change.row)

    def compare(self, other: Ledger) -> Iterator[Difference]:
        """Each row in which the two are not the same: `old` is this one's. By table and key."""
        for name in rows.TABLES:
            mine, theirs = self.tables[name], other.tables[name]
            unlike = [key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)]
            for key in sorted(unlike, key=repr):
                yield Difference(name, key, mine.get(key), theirs.get(key))

    def differences(self, other: Ledger) -> Iterator[str]:
        """The same, a line for each row."""
        for found in self.compare(other):
            yield f"{found.table}{list(found.key)}: {found.old} is not {found.new}"

    def follow(self, records: Iterable[Record]) -> list[Difference]:
        """Applies the records, and tells what they changed in all: what `compare` would say of a copy from
        before, but only the rows that they touch are looked at and copied. `new` is the ledger's own row.
        LookupError as of `apply`."""
        before: dict[tuple[str, Key], rows.Row | None] = {}
        for record in records:
            changes = project(record)
            for change in changes:
                place = change.table, change.key
                if place not in before:
                    before[place] = copy(self.tables[change.table].get(change.key))
            self.apply(changes)
        after = (
            Difference(table, key, old, self.tables[table][key]) for (table, key), old in before.items()
        )
        unlike = [found for found in after if found.old != found.new]
        return sorted(unlike, key=lambda found: (_ORDER[found.table], repr(found.key)))


def fold(records: Iterable[Record]) -> Ledger:
    """The state that a journal describes."""
    ledger = Ledger()
    for record in records:
        ledger.apply(project(record))
    return ledger


def _add(row: rows.Row, more: rows.Row) -> None:
    for column in row.__struct_fields__:
        value = getattr(more, column)
        if column in row.SUMS:
            setattr(row, column, getattr(row, column) + value)
        elif value is not None:
            setattr(row, column, value)
