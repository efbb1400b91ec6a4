"""Every kind of event: its JSON of the first release still decodes, and folds to the recorded state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tink.domain import events, rows
from tink.domain.events import KINDS, AnyEvent, Record, Subject
from tink.domain.ledger import Ledger, fold
from tink.domain.projection import Insert, Update, Upsert, project

GOLDEN = Path(__file__).parent / "golden"

ME = Subject(tenant="t", session_id="s")
MODEL = Subject(tenant="t", session_id="s", model_id="s:train:0")


def _about(subject: Subject, **more: Any) -> Subject:
    return Subject(**msgspec.structs.asdict(subject) | more)


# A history with every kind of event, and with every field of each set to something: the golden files are
# written from it once, and never again.
HISTORY: list[tuple[Subject, AnyEvent]] = [
    (Subject(), events.IncarnationStarted(number=1, boot_id="b", version="0.1.0", settings_digest="d")),
    (
        Subject(replica="trainer"),
        events.TrainerStarted(incarnation="i", engine="hf", base_model="m", base_digest="x"),
    ),
    (
        ME,
        events.SessionCreated(
            tags=["a", "ü"],
            user_metadata={"k": [1, 2.5, None, {"deep": True}]},
            sdk_version="0.38.0",
            project_id="p",
            display_name="n",
            idempotency_key="key",
        ),
    ),
    (ME, events.SessionMoved(project_id="q")),
    (ME, events.ClientFailed(exception_type="builtins.ValueError")),
    (
        _about(MODEL, job_id="s:train:0:0"),
        events.JobAccepted(
            op="create_model", seq_id=0, model_seq_id=0, request='{"x":1}', body_bytes=7, codec="identity"
        ),
    ),
    (
        _about(MODEL, job_id="s:train:0:0"),
        events.JobStarted(attempt=1, backend="trainer", op_no=1, seq_id=0, directory="s/0/00000001-x"),
    ),
    (
        _about(MODEL, job_id="s:train:0:0"),
        events.JobDone(
            result={"model_id": "s:train:0"},
            result_sha256="ab",
            result_bytes=3,
            tokens_in=4,
            tokens_out=5,
            loss_sum=-0.1,
            metrics={"loss:sum": 1e-300},
            run_ms=12.5,
        ),
    ),
    (
        MODEL,
        events.ModelCreated(
            base_model="m",
            rank=8,
            alpha=32.0,
            seed=2**62,
            train_attn=True,
            train_mlp=False,
            train_unembed=True,
            user_metadata={"run": 1},
            source="tinker://o/weights/a",
        ),
    ),
    (
        _about(MODEL, job_id="s:train:0:1"),
        events.JobAccepted(
            op="forward_backward", seq_id=1, body_sha256="cd", body_bytes=9, codec="zstd", invalid="cut off"
        ),
    ),
    (
        _about(MODEL, job_id="s:train:0:1"),
        events.JobFailed(category="user", error="the body is cut off", seq_id=1),
    ),
    (Subject(model_id="s:train:0"), events.SeqSkipped(first=2, last=4)),
    (_about(MODEL, job_id="s:train:0:1"), events.Diverged(op_no=1, detail="another loss")),
    (
        _about(MODEL, job_id="j", adapter_id="s:train:0@1"),
        events.AdapterExported(
            version=1, directory="d/1", size_bytes=10, files={"adapter.safetensors": "ef"}
        ),
    ),
    (_about(MODEL, adapter_id="s:train:0@1", replica="trainer"), events.AdapterPlaced(state="loading")),
    (_about(MODEL, adapter_id="s:train:0@1", replica="trainer"), events.AdapterPlaced(state="loaded")),
    (
        _about(MODEL, job_id="j", adapter_id="s:train:0@1"),
        events.CheckpointSaved(
            checkpoint_kind="sampler_weights",
            name="n",
            directory="d/1",
            size_bytes=10,
            user_metadata={"step": "1"},
            expires_at=1.7e9,
        ),
    ),
    (
        MODEL,
        events.CheckpointForked(
            checkpoint_id="fork-f",
            name="mended",
            directory="d/2",
            size_bytes=12,
            op_no=1,
            step=1,
            edits=["without s:train:0:1"],
        ),
    ),
    (MODEL, events.CheckpointChanged(checkpoint_id="j", public=True, expires_at=None)),
    (
        _about(MODEL, job_id="s:train:0:1"),
        events.SnapshotTaken(snapshot_id="snap", op_no=1, directory="s/0/snapshots/1", size_bytes=11),
    ),
    (MODEL, events.SnapshotDropped(snapshot_id="snap", reason="pruned")),
    (
        _about(ME, adapter_id="s:train:0@1"),
        events.SamplerCreated(
            sampler_id="s:sample:0",
            sampling_seq_id=0,
            base_model="m",
            model_path="tinker://m/sampler_weights/n",
        ),
    ),
    (
        _about(ME, job_id="s:sample:0:0", adapter_id="s:train:0@1"),
        events.JobAccepted(op="sample", seq_id=0, sampler_id="s:sample:0", seed=42, num_samples=3),
    ),
    (_about(ME, job_id="s:sample:0:0"), events.JobCancelled()),
    (MODEL, events.CheckpointDeleted(checkpoint_id="j", reason="overwritten")),
    (ME, events.SessionFinished(reason="done", detail="by hand")),
    (Subject(), events.IncarnationStopped(number=1, reason="stopped")),
    (_about(MODEL, adapter_id="s:train:0@1"), events.AdapterDeleted(reason="idle")),
    (
        Subject(),
        events.BodiesPruned(count=2, bytes=12, submitted_before=1.7e9, finished_before=1.6e9),
    ),
    (_about(MODEL, job_id="s:train:0:2"), events.ModelRemoved()),
    (
        _about(MODEL, job_id="s:train:0:5"),
        events.JobAccepted(op="optim_step", seq_id=5, request="{}", body_bytes=2, key="k"),
    ),
    (_about(MODEL), events.Redone(first=1, last=2, run_ms=3.5)),
    (
        _about(MODEL, job_id="s:train:0:5"),
        events.JobDone(metrics={"grad_norm": 0.5}, run_ms=2.0, step=1, learning_rate=1e-4),
    ),
]


def _records() -> list[Record]:
    return [
        Record(seq, 1_700_000_000.0 + seq, 1, subject, event)
        for seq, (subject, event) in enumerate(HISTORY, 1)
    ]


def _golden(name: str) -> Path:
    return GOLDEN / f"{name}.json"


def _state(ledger: Ledger) -> Any:
    return {
        name: [msgspec.to_builtins(row) for row in table.values()] for name, table in ledger.tables.items()
    }


def _remember(path: Path, content: bytes) -> None:
    """A kind that is new gets its golden bytes at the first run; they are then checked in. What is there
    already is never written again: a journal of that release is out there."""
    if not path.exists():
        path.write_bytes(content)


def test_every_kind_of_event_is_in_the_history() -> None:
    assert {type(event) for _, event in HISTORY} == set(KINDS.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_golden_bytes_of_every_kind_still_decode(kind: str) -> None:
    made = [msgspec.json.encode(event) for _, event in HISTORY if isinstance(event, KINDS[kind])]
    _remember(_golden(kind), b"\n".join(made) + b"\n")
    lines = _golden(kind).read_bytes().splitlines()
    decoded = [msgspec.json.decode(line, type=AnyEvent) for line in lines]
    assert decoded == [event for _, event in HISTORY if isinstance(event, KINDS[kind])][: len(lines)]
    for line in lines:
        # As a newer writer would have it: with a field that is not known yet.
        newer = {**msgspec.json.decode(line), "added_later": 1}
        assert msgspec.convert(newer, AnyEvent) in decoded


def test_no_field_that_was_ever_written_is_gone() -> None:
    """A decoder would pass over it without a word."""
    for kind, struct in KINDS.items():
        written = {
            name for line in _golden(kind).read_bytes().splitlines() for name in msgspec.json.decode(line)
        }
        assert written <= {*struct.__struct_fields__, "kind"}


def test_the_recorded_history_folds_to_the_recorded_state() -> None:
    """The whole of it, as the journal stores it: seq, subject and event."""
    _remember(_golden("history"), b"\n".join(map(msgspec.json.encode, _records())) + b"\n")
    _remember(_golden("state"), msgspec.json.format(msgspec.json.encode(_state(fold(_records())))))
    stored = [
        msgspec.json.decode(line, type=Record) for line in _golden("history").read_bytes().splitlines()
    ]
    state = msgspec.json.decode(_golden("state").read_bytes())
    folded = _state(fold(stored))
    for table, found in state.items():
        for was, now in zip(found, folded[table], strict=True):
            assert {name: now[name] for name in was} == was


@pytest.mark.parametrize("kind", KINDS)
def test_a_projection_fits_its_tables(kind: str) -> None:
    """Changes name tables and columns that exist, and an update its whole key."""
    for record in _records():
        for change in project(record):
            row, key = rows.TABLES[change.table]
            if isinstance(change, Update):
                assert set(change.values) <= set(row.__struct_fields__)
                assert len(change.key) == len(key)
                assert None not in change.key
            else:
                assert isinstance(change.row, row)


def test_history_without_a_projection_changes_nothing() -> None:
    silent = {
        events.TrainerStarted,
        events.ClientFailed,
        events.Diverged,
        events.Redone,
        events.BodiesPruned,
    }
    for record in _records():
        assert (project(record) == []) == (type(record.event) in silent)


def test_an_insert_of_a_row_that_is_there_raises() -> None:
    ledger = fold(_records())
    row = next(iter(ledger.sessions.values()))
    with pytest.raises(LookupError, match="sessions has the row"):
        ledger.apply([Insert("sessions", row)])
    ledger.apply([Upsert("sessions", row)])


def test_an_update_of_nothing_raises() -> None:
    with pytest.raises(LookupError, match="jobs has no row"):
        fold(_records()).apply([Update("jobs", ("nobody's",), {"state": "done"})])


@pytest.mark.parametrize("index", range(len(HISTORY)))
def test_an_event_twice_is_never_taken_silently_for_two(index: int) -> None:
    """An insert or an end twice raises; what only updates gives the same state again."""
    records = _records()
    ledger = fold(records[: index + 1])
    before = _state(ledger)
    changes = project(records[index])
    if any(
        isinstance(change, Insert) or (isinstance(change, Update) and change.open) for change in changes
    ):
        with pytest.raises(LookupError):
            ledger.apply(changes)
    else:
        ledger.apply(changes)
        assert _state(ledger) == before


def test_differences_name_the_row() -> None:
    one, other = fold(_records()), fold(_records())
    other.sessions[("s",)].state = "open"
    del other.jobs[("s:sample:0:0",)]
    lines = list(one.differences(other))
    assert len(lines) == 2
    assert {line.partition(":")[0] for line in lines} == {"sessions['s']", "jobs['s"}
