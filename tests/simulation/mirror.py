"""The journal as its file has it: every event that is committed is read back, held against the rules of a
job's life, and folded; the rows that it changed are then compared with those in the tables.
(docs/simulation.md has the table of the invariants.)"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import msgspec
import trio
from sqlalchemy import JSON, Boolean

from tink.domain import events, rows
from tink.domain.events import AnyEvent, Record, Subject
from tink.domain.ledger import Ledger
from tink.domain.projection import Change, Key, Update, project
from tink.journal import schema
from tink.limits import SEQ_GAP_SECONDS

# One of these may begin while one of those, of the same model, runs.
AHEAD = ("forward", "forward_backward", "optim_step")
FOLLOWED = (*AHEAD, "save_weights", "save_weights_for_sampler", "save_weights_external")


class Violation(AssertionError):
    """An invariant does not hold."""


def require(holds: bool, text: str) -> None:
    if not holds:
        raise Violation(text)


class Mirror:
    """`made`: when a row was made, `ended`: when a job ended, as a `seq`. Raises Violation."""

    def __init__(self) -> None:
        # When a job was first seen, in any life of the worker.
        self._since: dict[str, float] = {}
        self._forget()

    def _forget(self) -> None:
        self.records: list[Record] = []
        self._hash = bytes(32)
        self.ledger = Ledger()
        self.made: dict[tuple[str, Key], int] = {}
        self.ended: dict[str, int] = {}
        self._jobs: defaultdict[str | None, list[rows.Job]] = defaultdict(list)

    def follow(self, reader: sqlite3.Connection) -> tuple[list[Record], list[tuple[str, Key]]]:
        """Takes in what was committed since the last time: the events, and the rows that they changed."""
        new = self._chained(_read(reader, after=len(self.records)))
        touched = list(dict.fromkeys(place for record in new for place in self._take(record)))
        for table, key in touched:
            stored, folded = _stored(reader, table, key), self.ledger.tables[table].get(key)
            require(stored == folded, f"J6: {table}{key} is {stored} on disk, and {folded} by the events")
        return new, touched

    def begin_again(self, reader: sqlite3.Connection, least: int) -> None:
        """A worker opens what the one before left: the first `least` events, and maybe more."""
        before, found = self.records, [record for record, _, _ in _read(reader, after=0)]
        require(len(found) >= least, f"J1: {least} events were durable, {len(found)} are left")
        kept = min(len(before), len(found))
        require(found[:kept] == before[:kept], "J4: an event has changed")
        self._forget()
        for record in self._chained(_read(reader, after=0)):
            self._take(record)
        for name in rows.TABLES:
            stored, folded = _table(reader, name), self.ledger.tables[name]
            require(stored == folded, f"J6: {name} is not the fold of the events")

    def _chained(self, found: Iterable[tuple[Record, bytes, bytes]]) -> list[Record]:
        records = []
        for record, content, kept in found:
            self._hash = hashlib.sha256(self._hash + content).digest()
            require(kept == self._hash, f"J13: event {record.seq} has not the hash of what came so far")
            records.append(record)
        return records

    def _take(self, record: Record) -> list[tuple[str, Key]]:
        self._check(record.event, record.subject)
        self.records.append(record)
        require(
            record.seq == len(self.records), f"J4: event {record.seq} comes as the {len(self.records)}."
        )
        changes = project(record)
        self.ledger.apply(changes)
        places = [_place(change) for change in changes]
        for change, place in zip(changes, places, strict=True):
            if not isinstance(change, Update):
                self.made.setdefault(place, record.seq)
        if isinstance(record.event, events.JobAccepted):
            job = self.ledger.jobs[(record.subject.job_id,)]
            self._jobs[job.model_id].append(job)
            self._since.setdefault(job.job_id, trio.current_time())
        if isinstance(record.event, events.JobDone | events.JobFailed | events.JobCancelled):
            self.ended[str(record.subject.job_id)] = record.seq
        return places

    def is_ahead(self, job_id: str) -> bool:
        job = self.ledger.jobs.get((job_id,))
        return job is not None and self._first_running(job) is not job

    # -- a job's life -------------------------------------------------------------------------------

    def _check(self, event: AnyEvent, who: Subject) -> None:
        job = self.ledger.jobs.get((who.job_id,))
        is_open = job is not None and job.state in rows.OPEN
        match event:
            case events.JobAccepted():
                require(job is None, f"J3: {who.job_id} is accepted twice")
            case events.JobStarted():
                require(is_open, f"J3: {who.job_id} is started, and is {job and job.state}")
                assert job is not None
                require(event.attempt == job.attempts + 1, f"J3: attempt {event.attempt} of {job}")
                if job.model_id is not None:
                    self._check_turn(job, event)
            case events.JobDone():
                require(is_open, f"J3: {who.job_id} ends a second time")
                require(job is not None and job.attempts > 0, f"J3: {who.job_id} is done and never began")
                assert job is not None
                steps = job.op in ("forward_backward", "optim_step")
                step = self.ledger.models[(job.model_id,)].steps + 1 if steps else None
                require(event.step == step, f"X9: {who.job_id} is of step {event.step}, not {step}")
                if job.model_id is not None:
                    self._check_end(job)
            case events.JobFailed() | events.JobCancelled():
                require(is_open, f"J3: {who.job_id} ends a second time")
                assert job is not None
                if isinstance(event, events.JobFailed) and event.seq_id is not None and not job.attempts:
                    self._check_order(job)
                if job.model_id is not None:
                    self._check_end(job)
            case events.SeqSkipped():
                self._check_skip(event, str(who.model_id))
            case events.SnapshotTaken():
                self._check_snapshot(event, str(who.model_id))

    def _check_turn(self, job: rows.Job, event: events.JobStarted) -> None:
        if event.attempt > 1:
            again = (event.op_no, event.directory) == (job.op_no, job.directory)
            require(again, f"X1: another attempt of {job.job_id} has another op_no or directory")
            return
        model = self.ledger.models[(job.model_id,)]
        require(event.op_no == model.op_no + 1, f"X1: op_no {event.op_no} comes after {model.op_no}")
        self._check_order(job)
        busy = [other for other in self._jobs[model.model_id] if other.state == "running"]
        follows = [(job.op in AHEAD, other.op in FOLLOWED, other.op_no) for other in busy]
        require(
            not busy or follows == [(True, True, model.op_no)],
            f"X2: {job.job_id} begins while {[other.job_id for other in busy]} run",
        )

    def _check_end(self, job: rows.Job) -> None:
        first = self._first_running(job)
        require(not job.attempts or first is job, f"X2: {job.job_id} ends before {first}")

    def _first_running(self, job: rows.Job) -> rows.Job | None:
        """Of its model."""
        running = (one for one in self._jobs[job.model_id] if one.state == "running")
        return min(running, key=lambda one: one.op_no or 0, default=None)

    def _check_order(self, job: rows.Job) -> None:
        model = self.ledger.models[(job.model_id,)]
        require(job.seq_id == model.next_seq, f"X5: {job.job_id} has its turn at number {model.next_seq}")

    def _check_skip(self, skipped: events.SeqSkipped, model_id: str) -> None:
        model = self.ledger.models[(model_id,)]
        first, last = skipped.first, skipped.last
        require(model.next_seq == first <= last, f"X5: {first} to {last} skipped at {model.next_seq}")
        there = [job.job_id for job in self._jobs[model_id] if first <= job.seq_id <= last]
        require(not there, f"X5: {there} are skipped and were there")
        behind = [self._since[job.job_id] for job in self._jobs[model_id] if job.seq_id > last]
        waited = trio.current_time() - min(behind, default=trio.current_time())
        require(waited >= SEQ_GAP_SECONDS, f"X5: {first} to {last} are skipped after {waited} s")

    def _check_snapshot(self, taken: events.SnapshotTaken, model_id: str) -> None:
        jobs = [job for job in self._jobs[model_id] if job.op_no is not None]
        late = [job.job_id for job in jobs if job.op_no <= taken.op_no and job.state in rows.OPEN]
        require(not late, f"X6: a snapshot of op {taken.op_no} while {late} have not ended")


# -- reading, without the code that wrote it --------------------------------------------------------


def _read(reader: sqlite3.Connection, after: int) -> list[tuple[Record, bytes, bytes]]:
    """Each event, what is hashed of it, and its hash."""
    cursor = reader.execute("SELECT * FROM events WHERE seq > ? ORDER BY seq", (after,))
    names = [column[0] for column in cursor.description]
    return [_record(dict(zip(names, values, strict=True))) for values in cursor]


def _record(columns: dict[str, Any]) -> tuple[Record, bytes, bytes]:
    kept, text = columns.pop("hash"), columns.pop("data")
    data, numbers = msgspec.json.decode(text), json.loads(text, parse_float=_number, parse_int=_number)
    head = {name: columns.pop(name) for name in ("seq", "at", "incarnation")}
    kind = columns.pop("kind")
    content = [*head.values(), kind, *columns.values(), numbers]
    event: AnyEvent = msgspec.convert({**data, "kind": kind}, AnyEvent)  # type: ignore[arg-type]
    record = Record(subject=Subject(**columns), event=event, **head)
    return record, msgspec.json.encode(content, order="sorted"), kept


def _number(text: str) -> float | int:
    """As it is hashed: whole as a whole number, where those are exact."""
    number = float(text)
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _stored(reader: sqlite3.Connection, name: str, key: Key) -> rows.Row | None:
    where = " AND ".join(f"{column} = ?" for column in rows.TABLES[name][1])
    return next(iter(_select(reader, name, where, key)), None)


def _table(reader: sqlite3.Connection, name: str) -> dict[Key, rows.Row]:
    keys = rows.TABLES[name][1]
    return {tuple(getattr(row, key) for key in keys): row for row in _select(reader, name, "1", ())}


def _select(reader: sqlite3.Connection, name: str, where: str, key: Key) -> Iterable[rows.Row]:
    columns = schema.metadata.tables[name].columns
    for values in reader.execute(f"SELECT {', '.join(columns.keys())} FROM {name} WHERE {where}", key):
        converted = {
            column.name: _value(column.type, value) for column, value in zip(columns, values, strict=True)
        }
        yield rows.TABLES[name][0](**converted)


def _value(kind: object, value: Any) -> Any:
    if value is not None and isinstance(kind, JSON):
        return msgspec.json.decode(value)
    if value is not None and isinstance(kind, Boolean):
        return bool(value)
    return value


def _place(change: Change) -> tuple[str, Key]:
    if isinstance(change, Update):
        return change.table, change.key
    keys = rows.TABLES[change.table][1]
    return change.table, tuple(getattr(change.row, key) for key in keys)
