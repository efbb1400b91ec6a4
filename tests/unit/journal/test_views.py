"""The views tell what happened, and no question to them goes through a table that is long."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from sqlalchemy import Connection

from tests.unit.journal.hot import Asked, hot
from tests.unit.journal.journal_kit import copy_of, opened, written
from tink.audit.questions import QUESTIONS
from tink.domain import events
from tink.domain.events import AnyEvent, Subject
from tink.home import Home
from tink.journal import views
from tink.journal.reader import open_journal

SESSION, MODEL, CHILD, SAMPLER = "s", "s:train:0", "s:train:1", "s:sample:0"
SHAPE: dict[str, Any] = {
    "rank": 8,
    "alpha": 32.0,
    "seed": 7,
    "train_attn": True,
    "train_mlp": True,
    "train_unembed": True,
}


def _about(
    model_id: str | None = None, job_id: str | None = None, adapter_id: str | None = None
) -> Subject:
    return Subject(tenant="t", session_id=SESSION, model_id=model_id, job_id=job_id, adapter_id=adapter_id)


class _Run:
    """Makes the events of a run; each job is a second later than the one before."""

    def __init__(self) -> None:
        self.entries: list[tuple[Subject, AnyEvent]] = [(_about(), events.SessionCreated())]
        self._seq: dict[str, int] = {}

    def job(
        self, model_id: str, op: Any, *, directory: str | None = None, attempts: int = 1, **done: Any
    ) -> str:
        seq = self._seq[model_id] = self._seq.get(model_id, -1) + 1
        job_id = f"{model_id}:{seq}"
        who = _about(model_id, job_id)
        number = int(model_id[-1]) if seq == 0 else None
        accepted = events.JobAccepted(op=op, seq_id=seq, model_seq_id=number, request="{}")
        self.entries.append((who, accepted))
        for attempt in range(1, attempts + 1):
            started = events.JobStarted(
                attempt=attempt, backend="trainer", op_no=seq + 1, seq_id=seq, directory=directory
            )
            self.entries.append((who, started))
        self.entries.append((who, events.JobDone(**done)))
        if seq == 0:
            made = events.ModelCreated(base_model="base", source=None, **SHAPE)
            self.entries.append((who, made))
        return job_id

    def step(self, model_id: str, step: int, *losses: float, attempts: int = 1) -> None:
        for loss in losses:
            self.job(model_id, "forward_backward", loss_sum=loss, tokens_in=10, run_ms=5.0, step=step)
        self.job(
            model_id,
            "optim_step",
            attempts=attempts,
            metrics={"grad_norm": 0.5},
            run_ms=1.0,
            step=step,
            learning_rate=1e-4,
        )


def _history() -> list[tuple[Subject, AnyEvent]]:
    run = _Run()
    run.job(MODEL, "create_model")
    run.step(MODEL, 1, 3.0, 4.0)
    run.step(MODEL, 2, 5.0, attempts=3)
    saved = run.job(MODEL, "save_weights", directory="state")
    checkpoint = events.CheckpointSaved(
        checkpoint_kind="weights", name="w", directory="state", size_bytes=1, step=2
    )
    run.entries.append((_about(MODEL, saved), checkpoint))
    run.step(MODEL, 3, 90.0)
    run.job(CHILD, "load_weights", directory="state")
    run.step(CHILD, 1, 2.0)
    exported = run.job(CHILD, "save_weights_for_sampler", directory="export")
    who = _about(CHILD, exported, f"{CHILD}@1")
    version = events.AdapterExported(version=1, directory="export", size_bytes=9, files={}, step=1)
    sampler = events.SamplerCreated(sampler_id=SAMPLER, sampling_seq_id=0, base_model="base")
    run.entries += [(who, version), (who, sampler)]
    sample = _about(None, f"{SAMPLER}:0")
    asked = events.JobAccepted(op="sample", seq_id=0, sampler_id=SAMPLER, seed=4, num_samples=2)
    answered = events.JobDone(tokens_in=7, tokens_out=9, run_ms=3.0)
    run.entries += [
        (sample, asked),
        (sample, events.JobStarted(attempt=1, backend="v")),
        (sample, answered),
    ]
    lost = _about(None, f"{SAMPLER}:1")
    run.entries += [
        (lost, events.JobAccepted(op="sample", seq_id=1, sampler_id=SAMPLER)),
        (lost, events.JobFailed(category="server", error="it broke")),
        (_about(MODEL), events.Redone(first=1, last=3, run_ms=70.0)),
        (_about(MODEL), events.Redone(first=4, last=3, run_ms=5.0)),
        (_about(MODEL, saved), events.Diverged(op_no=3, detail="other bits")),
        (_about(MODEL), events.SeqSkipped(first=40, last=41)),
        (_about(), events.ClientFailed(exception_type="ValueError")),
    ]
    return run.entries


def _trainer(incarnation: str) -> AnyEvent:
    return events.TrainerStarted(
        incarnation=incarnation, engine="hf", base_model="base", base_digest="d", arch="a", max_context=9
    )


def _write(made: Home) -> None:
    """Two workers: the first one crashed."""

    async def live() -> None:
        with pytest.RaisesGroup(RuntimeError, flatten_subgroups=True, allow_unwrapped=True):
            async with opened(made) as journal:
                await journal.append((Subject(replica="trainer"), _trainer("one")))
                raise RuntimeError("a crash")
        async with opened(made) as journal:
            for entry in [
                (Subject(replica="trainer"), _trainer("two")),
                *_history(),
                (Subject(replica="trainer"), _trainer("three")),
            ]:
                await journal.append(entry)

    trio.run(live)


@pytest.fixture
def home(on_database: str, tmp_path: Path) -> Home:
    return copy_of(_write, tmp_path / "home")


@pytest.fixture
def asked(home: Home) -> Iterator[Connection]:
    with open_journal(home) as connection:
        yield connection


def _rows(connection: Connection, query: str) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in connection.exec_driver_sql(query)]


def test_a_step_adds_up_the_jobs_that_made_it(asked: Connection) -> None:
    query = "SELECT step, loss_sum, tokens, jobs, updates, learning_rate, grad_norm, run_ms FROM v_steps"
    assert _rows(asked, f"{query} WHERE model_id = '{MODEL}' ORDER BY step") == [
        (1, 7.0, 20, 3, 1, 1e-4, 0.5, 11.0),
        (2, 5.0, 10, 2, 1, 1e-4, 0.5, 6.0),
        (3, 90.0, 10, 2, 1, 1e-4, 0.5, 6.0),
    ]
    ((names,),) = _rows(asked, f"SELECT job_ids FROM v_steps WHERE model_id = '{MODEL}' AND step = 1")
    assert sorted(names.split()) == [f"{MODEL}:{seq}" for seq in (1, 2, 3)]


def test_an_adapter_names_its_parent_its_step_and_who_sampled_from_it(asked: Connection) -> None:
    query = "SELECT adapter_id, base_model, step, parent, sampler_ids, samples FROM v_adapters"
    ((adapter, base, step, parent, samplers, samples),) = _rows(asked, query)
    assert (adapter, base, step, samplers, samples) == (f"{CHILD}@1", "base", 1, SAMPLER, 2)
    assert _rows(asked, f"SELECT model_id, step FROM checkpoints WHERE checkpoint_id = '{parent}'") == [
        (MODEL, 2)
    ]


def test_a_sample_names_the_version_that_gave_it(asked: Connection) -> None:
    query = "SELECT job_id, model_id, adapter_id, step, prompt_tokens, sampled_tokens, state FROM v_samples"
    assert _rows(asked, f"{query} ORDER BY job_id") == [
        (f"{SAMPLER}:0", CHILD, f"{CHILD}@1", 1, 7, 9, "done"),
        (f"{SAMPLER}:1", CHILD, f"{CHILD}@1", 1, 0, 0, "failed"),
    ]


def test_every_incident_is_there_once(asked: Connection) -> None:
    found = _rows(asked, "SELECT kind, detail FROM v_incidents ORDER BY kind, detail")
    assert found == [
        ("client_failure", "ValueError"),
        ("divergence", "other bits"),
        ("failure", "server: it broke"),
        ("gap", "numbers 40 to 41 never came"),
        ("redo", "a snapshot was restored, with all that was applied"),
        ("redo", "operations 1 to 3 once more"),
        ("retry", "started 3 times"),
        ("trainer_restart", "another training server: three"),
        ("worker_crash", "worker 1 left no stop"),
    ]
    assert _rows(asked, "SELECT lost_ms FROM v_incidents WHERE kind = 'redo' ORDER BY seq") == [
        (70.0,),
        (5.0,),
    ]


def test_usage_adds_up_what_ended(asked: Connection) -> None:
    columns = "tenant, done, failed, cancelled, training_tokens, prompt_tokens, sampled_tokens"
    ((tenant, done, *rest),) = _rows(asked, f"SELECT {columns} FROM v_usage")
    ((counted,),) = _rows(asked, "SELECT count(*) FROM jobs WHERE state = 'done'")
    assert (tenant, done, rest) == ("t", counted, [1, 0, 50, 7, 9])


def test_jobs_tell_their_times(asked: Connection) -> None:
    query = "SELECT submitted, total_ms >= 0, run_ms, attempts, step FROM v_jobs WHERE attempts > 1"
    ((submitted, in_order, run_ms, attempts, step),) = _rows(asked, query)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", submitted)
    assert (in_order, run_ms, attempts, step) == (1, 1.0, 3, 2)


# -- the questions of tink audit --------------------------------------------------------------------

ARGUMENTS: dict[str, str | int] = {"model": MODEL, "adapter": f"{CHILD}@1", "step": 1, "days": 100}


def _answer(connection: Connection, name: str, **changed: str | int) -> list[dict[str, Any]]:
    query = QUESTIONS[name].filled(ARGUMENTS | changed)
    return [dict(row) for row in connection.exec_driver_sql(query).mappings()]


def test_a_lineage_goes_back_to_the_first_model_and_counts_what_was_kept(asked: Connection) -> None:
    found = _answer(asked, "lineage")
    told = [(row["depth"], row["model_id"], row["last_step"], row["steps"], row["tokens"]) for row in found]
    # The third step of the first model came after what was loaded.
    assert told == [(0, CHILD, 1, 1, 10), (1, MODEL, 2, 2, 30)]


def test_a_jump_of_the_loss_leads_to_its_step_and_from_there_to_its_data(asked: Connection) -> None:
    first = _answer(asked, "jumps")[0]
    assert (first["step"], first["jump"]) == (3, 8.5)
    jobs = _answer(asked, "data", step=3)
    assert [(job["op"], job["loss_sum"]) for job in jobs] == [
        ("forward_backward", 90.0),
        ("optim_step", None),
    ]


def test_no_step_is_double_or_missing_until_one_is(asked: Connection) -> None:
    assert _answer(asked, "steps") == []


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE steps SET updates = 2 WHERE model_id = 's:train:0' AND step = 2",
        "DELETE FROM steps WHERE model_id = 's:train:0' AND step = 2",
        "UPDATE steps SET updates = 0 WHERE model_id = 's:train:0' AND step = 3",
        "UPDATE jobs SET step = NULL WHERE job_id = 's:train:0:1'",
    ],
)
def test_a_step_that_is_double_or_missing_is_told(home: Home, change: str) -> None:
    with written(home) as connection:
        connection.exec_driver_sql(change)
        assert [row["model_id"] for row in _answer(connection, "steps")] == [MODEL]


@pytest.mark.parametrize("name", ["slow-jobs", "lost-time", "samples", "usage"])
def test_a_question_has_an_answer(asked: Connection, name: str) -> None:
    assert _answer(asked, name)


def test_a_value_is_taken_as_it_is() -> None:
    """Whatever is in it that the SQL has, too."""
    query = QUESTIONS["data"].filled({"model": "it's:step", "step": 3})
    assert "WHERE model_id = 'it''s:step' AND step = 3\n" in query


# -- plans and dialects -----------------------------------------------------------------------------

HOT = hot(Asked())
# As the views and questions call the tables that grow with what happens. The first event from the end is
# "SCAN events", once.
LONG = re.compile(r"SCAN (events|jobs|e|p|b|j|l|x|f|loaded|load|samplers|checkpoints|c|adapters|a)\b")


@pytest.mark.on_files  # of PostgreSQL: test_postgres_plans.py
@pytest.mark.parametrize("name", HOT)
def test_no_hot_question_goes_through_a_long_table(asked: Connection, name: str) -> None:
    plan = [row[3] for row in asked.exec_driver_sql(f"EXPLAIN QUERY PLAN {HOT[name]}")]
    scans = [line for line in plan if LONG.match(line) and not _is_partial(line)]
    newest = "ORDER BY seq DESC LIMIT 1" in HOT[name]
    assert scans == (["SCAN events"] if newest else [])
    if "incidents" in name:  # of a retried job its own events, not all that ever began
        assert any("ix_events_job_id (job_id=?)" in line for line in plan)
        # and of a model what went wrong, not all that ever was
        assert not any("model_id=?" in line for line in plan)


def _is_partial(line: str) -> bool:
    """Through an index that has few rows, or little of each: that by time has what is asked for."""
    few = ("ix_jobs_retried", "ix_jobs_submitted_at", "ix_adapters_created_at")
    return "COVERING INDEX ix_jobs_model_id_step" in line or any(f"INDEX {name}" in line for name in few)


@pytest.mark.on_files
def test_the_views_have_the_same_names_and_columns_on_every_database() -> None:
    sqlite, postgresql = views.definitions("sqlite"), views.definitions("postgresql")
    assert list(sqlite) == list(postgresql) == list(views.VIEWS)
    for statement in [*sqlite.values(), *postgresql.values()]:
        assert not re.search(r"UTC\[|STRINGS\[", statement)
