"""The state at each point is the fold of the events up to it; what differs between two makes the one of the
other; a model's part is made from its own events alone. Whatever the history."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.journal.histories import Entry, histories
from tests.unit.journal.journal_kit import new_home, written
from tink.domain import events, rows
from tink.domain.events import IncarnationStarted, JobFailed, Record, SessionCreated, SessionMoved, Subject
from tink.domain.ledger import Difference, Ledger, fold
from tink.errors import NotFound, UserError
from tink.journal import chain, schema, store
from tink.journal.recording import Recording, open_recording
from tink.replay import state
from tink.replay.state import Scope
from tink.replay.steps import Breakpoint, Walk, parse_breakpoint

on_each_database = pytest.mark.usefixtures("on_database")

# In memory where there is such a folder: syncs to a disk are what takes the time here.
FOLDER = "/dev/shm" if Path("/dev/shm").is_dir() else None

ALL = Scope()


def _records(history: list[Entry]) -> list[Record]:
    boot = IncarnationStarted(number=1, boot_id="b", version="0", settings_digest="d")
    return [
        Record(seq, 1000.0 + seq, 1, subject, event)
        for seq, (subject, event) in enumerate([(Subject(), boot), *history], 1)
    ]


@contextmanager
def _recorded(records: list[Record]) -> Iterator[Recording]:
    """As a worker leaves them. A large float may come back as the whole number that it is."""
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        home = new_home(Path(folder))
        with written(home) as connection, connection.begin():
            store.write(connection, records, chain.START)
        with open_recording(home) as recording:
            yield recording


def _same(one: Ledger, other: Ledger) -> bool:
    return list(one.differences(other)) == []


def _plain(tables: state.Tables) -> Any:
    return {name: sorted(map(repr, found)) for name, found in tables.items()}


@on_each_database
@settings(max_examples=15, deadline=None)
@given(histories(), st.lists(st.integers(0, 1000), min_size=3, max_size=3))
def test_the_state_at_an_event_is_the_fold_up_to_it(history: list[Entry], jumps: list[int]) -> None:
    with _recorded(_records(history)) as recording:
        records = list(recording.records())
        for seq in range(1, len(records) + 1):
            assert _same(state.at(recording, ALL, seq), fold(records[:seq]))
        walk = Walk(recording, len(records))
        for jump in jumps:  # forwards and backwards
            seq = 1 + jump % len(records)
            walk.go(seq)
            assert walk.seq == seq
            assert _same(walk.ledger, fold(records[:seq]))


def _applied(ledger: Ledger, found: list[Difference]) -> Ledger:
    for one in found:
        table = ledger.tables[one.table]
        assert table.get(one.key) == one.old
        if one.new is None:
            del table[one.key]
        elif one.old is None:
            table[one.key] = copy(one.new)
        else:
            assert one.columns
            for name, (old, new) in one.columns.items():
                assert getattr(table[one.key], name) == old
                setattr(table[one.key], name, new)
    return ledger


@on_each_database
@settings(max_examples=15, deadline=None)
@given(histories(), st.lists(st.integers(0, 1000), min_size=8, max_size=8))
def test_a_difference_makes_one_state_of_the_other(history: list[Entry], jumps: list[int]) -> None:
    with _recorded(_records(history)) as recording:
        records = list(recording.records())
        for one, other in zip(jumps[::2], jumps[1::2], strict=True):
            old, new = 1 + one % len(records), 1 + other % len(records)
            found = state.difference(recording, ALL, old, new)
            assert found == list(fold(records[:old]).compare(fold(records[:new])))
            assert _same(_applied(fold(records[:old]), found), fold(records[:new]))


@settings(max_examples=50, deadline=None)
@given(histories(60))
def test_the_changes_of_each_event_make_the_next_state(history: list[Entry]) -> None:
    ledger, followed = Ledger(), Ledger()
    for record in _records(history):
        before = Ledger()
        _applied(before, list(Ledger().compare(ledger)))
        changes = ledger.follow([record])
        assert changes == list(before.compare(ledger))
        assert _same(_applied(followed, changes), ledger)


@on_each_database
@settings(max_examples=15, deadline=None)
@given(histories(40), st.integers(0, 1000), st.integers(0, 1000))
def test_a_models_part_is_made_from_its_own_events(history: list[Entry], one: int, other: int) -> None:
    with _recorded(_records(history)) as recording:
        records = list(recording.records())
        old, new = sorted((1 + one % len(records), 1 + other % len(records)))
        whole = fold(records[:new])
        for model in [row.model_id for row in whole.models.values()]:
            scope = Scope(model=model)
            part = state.select(state.at(recording, scope, new), scope, new)
            assert _plain(part) == _plain(state.select(whole, scope, new))
            assert len(part["models"]) == len(part["sessions"]) == 1
            assert part["incarnations"] == []
            found = state.difference(recording, scope, old, new)
            every = state.difference(recording, ALL, old, new)
            assert found == [d for d in every if d.new and scope.has(d.table, d.new, whole)]


def _models() -> list[Record]:
    """Two sessions with a model each, whose adapter the other session samples too."""
    found: list[Entry] = []
    for s in ("a", "b"):
        model = f"{s}:train:0"
        who = Subject(tenant="t", session_id=s, model_id=model, job_id=f"{model}:0")
        made = Subject(
            tenant="t", session_id=s, model_id=model, job_id=f"{model}:0", adapter_id=f"{model}@1"
        )
        found += [
            (Subject(tenant="t", session_id=s), SessionCreated()),
            (who, events.JobAccepted(op="create_model", seq_id=0, model_seq_id=0, request="{}")),
            (made, events.AdapterExported(version=1, directory="d", size_bytes=1, files={})),
        ]
    for s, adapter in (("a", "a:train:0@1"), ("b", "a:train:0@1"), ("b", None)):
        number = 1 if adapter is None else 0
        sampler = f"{s}:sample:{number}"
        made = Subject(tenant="t", session_id=s, adapter_id=adapter)
        found += [
            (made, events.SamplerCreated(sampler_id=sampler, sampling_seq_id=number, base_model="m")),
            (
                Subject(tenant="t", session_id=s, job_id=f"{sampler}:0"),
                events.JobAccepted(op="sample", seq_id=0, sampler_id=sampler, seed=1, num_samples=1),
            ),
        ]
    found.append((Subject(tenant="t", session_id="a"), SessionMoved(project_id="p")))
    placed = Subject(tenant="t", model_id="a:train:0", adapter_id="a:train:0@1", replica="trainer")
    found.append((placed, events.AdapterPlaced(state="loaded")))
    return _records(found)


@on_each_database
def test_a_models_part_has_its_samples_of_every_session() -> None:
    records = _models()
    with _recorded(records) as recording:
        scope = Scope(model="a:train:0")
        found = state.select(state.at(recording, scope, len(records)), scope, len(records))
        keys = {job.job_id for job in found["jobs"] if isinstance(job, rows.Job)}
        assert keys == {"a:train:0:0", "a:sample:0:0", "b:sample:0:0"}
        assert [len(found[name]) for name in ("samplers", "adapters", "adapter_placements")] == [2, 1, 1]
        assert [row.project_id for row in found["sessions"] if isinstance(row, rows.Session)] == ["p"]
        read = [record.seq for record in recording.records_of("a:train:0")]
        assert read == [2, 3, 4, 8, 9, 10, 11, 14, 15]


@pytest.mark.parametrize("table", sorted(rows.TABLES.keys() - {"incarnations", "usage"}))
def test_of_every_table_the_rows_of_a_model_are_known(table: str) -> None:
    """A table that is added is not left out in silence; those two are of everybody."""
    ledger = fold(_models())
    kind = rows.TABLES[table][0]
    owned = {"model_id": "a:train:0", "adapter_id": "a:train:0@1", "session_id": "a"}
    row = kind(**{name: owned.get(name) for name in kind.__struct_fields__})
    assert Scope(model="a:train:0").has(table, row, ledger)


def test_a_models_events_are_found_by_indexes_alone() -> None:
    with _recorded(_models()) as recording:
        where = schema.events.select().where(store._of_model("a:train:0"))
        text = where.compile(recording.journal.engine, compile_kwargs={"literal_binds": True})
        plan = recording.journal.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}")
        steps = [str(row[-1]) for row in plan]
        assert any("ix_events_model_id_seq" in step for step in steps)
        assert [step for step in steps if "SCAN" in step] == []


def test_a_job_has_what_it_exported_beside_it() -> None:
    ledger = fold(_models())
    found = state.select(ledger, Scope(job="b:train:0:0"), 1)
    assert [len(found[name]) for name in ("jobs", "adapters", "models")] == [1, 1, 0]
    assert state.select(ledger, Scope(job="b:train:0:0", table="adapters"), 1).keys() == {"adapters"}


@on_each_database
@pytest.mark.parametrize("scope", [Scope(model="a:train:7"), Scope(job="a:train:7")])
def test_what_is_not_there_yet_is_said_with_the_point(scope: Scope) -> None:
    records = _models()
    with _recorded(records) as recording:
        with pytest.raises(NotFound, match=r"there is no (model|job) 'a:train:7' behind event 5"):
            state.select(state.at(recording, scope, 5), scope, 5)
        with pytest.raises(NotFound, match="behind event 5"):
            state.difference(recording, scope, 5, 2)


@on_each_database
def test_a_missing_event_is_never_passed_over() -> None:
    records = _models()
    *_, lost, last = records
    with _recorded([record for record in records if record is not lost]) as recording:
        assert _same(state.at(recording, ALL, lost.seq - 1), fold(records[: lost.seq - 1]))
        with pytest.raises(LookupError, match=f"no event {lost.seq}"):
            state.at(recording, ALL, last.seq)
        with pytest.raises(LookupError, match=f"no event {lost.seq}"):
            state.difference(recording, ALL, 1, last.seq)
        with pytest.raises(LookupError, match=f"no event {lost.seq}"):
            Walk(recording, last.seq).go(last.seq)


# -- steps ------------------------------------------------------------------------------------------


@on_each_database
def test_a_walk_stops_behind_the_event_that_a_breakpoint_hits() -> None:
    records = _models()
    with _recorded(records) as recording:
        walk = Walk(recording, len(records))
        breaks = [Breakpoint("kind", "sampler_created"), Breakpoint("model", "b:train:0")]
        hits = []
        while (step := walk.run(breaks)) is not None:
            hits.append(step.record.seq)
            assert walk.seq == step.record.seq
            assert _same(walk.ledger, fold(records[: walk.seq]))
        assert hits == [6, 7, 8, 10, 12]
        assert walk.seq == len(records)
        assert walk.step() is None
        walk.go(8)
        again = walk.run([parse_breakpoint("job=b:sample:0:0")])
        assert again is not None
        assert again.record == records[10]
        assert [(one.table, one.key) for one in again.changes] == [("jobs", ("b:sample:0:0",))]


@on_each_database
def test_a_step_tells_each_column_that_changes() -> None:
    accepted = _models()[:3]
    who = accepted[-1].subject
    failed = Record(4, 1009.0, 1, who, JobFailed(category="user", error="no", seq_id=0))
    with _recorded([*accepted, failed]) as recording:
        walk = Walk(recording, 4)
        walk.go(3)
        step = walk.step()
        assert step is not None
        assert {one.table: one.columns for one in step.changes} == {
            "models": {"state": ("creating", "failed"), "next_seq": (0, 1)},
            "jobs": {
                "state": ("accepted", "failed"),
                "finished_at": (None, 1009.0),
                "error_category": (None, "user"),
                "error": (None, "no"),
            },
            "usage": {},  # a row that was not there
        }


@pytest.mark.parametrize("text", ["", "model", "model=", "=x", "kind=job", "events=1", "kind= job_done"])
def test_what_is_no_breakpoint_is_one_line_that_says_what_is(text: str) -> None:
    with pytest.raises(UserError, match=r"is no (breakpoint: model=ID|kind of event: adapter_deleted)"):
        parse_breakpoint(text)
