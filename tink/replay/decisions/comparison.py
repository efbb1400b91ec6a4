"""Where two sets of events that should be the same are not. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from tink.domain.events import AnyEvent, Entry, Record, Subject, kind_of
from tink.limits import CELL, REPLAY_CLOCK_SECONDS

# They depend on when something ran, and on nothing else.
TIMES = frozenset({"queue_ms", "run_ms", "idle_ms"})
NOTHING = "nothing"


class Difference(msgspec.Struct, frozen=True):
    """`seq`: of the recorded event; `subject`: the job, or whom else it is about. `recorded` and `today`:
    the event, in short, each with what the other has not."""

    seq: int
    kind: str
    subject: str
    recorded: str
    today: str


def differences(recorded: Sequence[Record], today: Sequence[Entry], instead: str) -> list[Difference]:
    """`recorded`: the events of one decision, the first of which says what it was. `instead`: what happens
    today where there are none."""
    first, *rest = recorded
    found = list(_pair(first, today[0] if today else None, instead))
    mine = sorted(((record.subject, record.event) for record in rest), key=_place)
    theirs = sorted(today[1:], key=_place)
    seqs = {_place((record.subject, record.event)): record for record in rest}
    left = {_place(entry): entry for entry in theirs}
    for entry in mine:
        found += _pair(seqs[_place(entry)], left.pop(_place(entry), None), NOTHING)
    for _, event in left.values():
        found.append(
            Difference(
                first.seq, kind_of(event), name_of(first.subject), NOTHING, _short(kind_of(event), {})
            )
        )
    return found


def name_of(subject: Subject) -> str:
    """Whom an event is about, by one id."""
    return subject.job_id or subject.adapter_id or subject.model_id or subject.session_id or "-"


def is_end(event: AnyEvent) -> bool:
    return kind_of(event) in ("job_done", "job_failed", "job_cancelled")


def same_course(recorded: Sequence[Record], today: Sequence[Entry]) -> bool:
    """Whether things go on in the same way after it, whatever the events hold."""
    if not today:
        return False
    (subject, event), first = today[0], recorded[0]
    return (subject.job_id, kind_of(event)) == (first.subject.job_id, kind_of(first.event))


def _place(entry: Entry) -> tuple[str, ...]:
    """What an event is among those of one decision."""
    subject, event = entry
    parts = (subject.adapter_id, subject.replica, getattr(event, "snapshot_id", None))
    return (kind_of(event), *(part or "" for part in parts))


def _pair(record: Record, entry: Entry | None, instead: str) -> Iterator[Difference]:
    def told(recorded: str, today: str) -> Difference:
        return Difference(record.seq, kind, name_of(record.subject), recorded, today)

    kind = kind_of(record.event)
    if entry is None:
        yield told(_short(kind, _telling(record.event)), instead)
        return
    subject, event = entry
    if kind_of(event) != kind:
        yield told(_short(kind, _telling(record.event)), _short(kind_of(event), _telling(event)))
        return
    mine = msgspec.structs.asdict(record.subject) | msgspec.structs.asdict(record.event)
    theirs = msgspec.structs.asdict(subject) | msgspec.structs.asdict(event)
    names = [name for name in mine if not _EQUAL.get(name, _equal)(mine[name], theirs[name])]
    names = [name for name in names if name not in TIMES]
    if names:
        yield told(
            _short(kind, {name: mine[name] for name in names}),
            _short(kind, {name: theirs[name] for name in names}),
        )


def _equal(mine: Any, theirs: Any) -> bool:
    return bool(mine == theirs)


def _about_equal(mine: float | None, theirs: float | None) -> bool:
    """Times that were made of a clock's reading some time before the commit."""
    if mine is None or theirs is None:
        return mine is theirs
    return abs(mine - theirs) <= REPLAY_CLOCK_SECONDS


_EQUAL: dict[str, Callable[[Any, Any], bool]] = {"expires_at": _about_equal}


def _telling(event: AnyEvent) -> dict[str, Any]:
    """What an event of another kind than expected is told by."""
    names = ("op", "seq_id", "op_no", "error", "result", "first", "last")
    values = msgspec.structs.asdict(event)
    return {name: values[name] for name in names if values.get(name) is not None}


def _short(kind: str, values: dict[str, Any]) -> str:
    parts = (f"{name}={msgspec.json.encode(value).decode()}" for name, value in values.items())
    text = " ".join([kind, *parts])
    return text if len(text) <= CELL else f"{text[: CELL - 1]}\N{HORIZONTAL ELLIPSIS}"
