"""Where the time of the last jobs went adds up to all of it."""

from __future__ import annotations

from typing import Any

import pytest

from tink.cli import stages
from tink.domain import rows


def job(op: str, **fields: Any) -> rows.Job:
    known: dict[str, Any] = {"submitted_at": 10.0, "queue_ms": 20.0, "finished_at": 10.1, "run_ms": 70.0}
    rest: dict[str, Any] = {
        **dict.fromkeys(("session_id", "model_id", "sampler_id", "model_seq_id", "body_sha256", "seed")),
        "num_samples": None,
    }
    names = {"job_id": "j", "tenant": "t", "op": op, "seq_id": 1, "accepted_seq": 1, "body_bytes": 0}
    return rows.Job(**{**names, "codec": "identity", "state": "done", **rest, **known, **fields})


def test_a_jobs_time_is_what_it_waited_its_server_took_and_the_worker_took() -> None:
    found = stages.of([job("forward_backward", idle_ms=3.0), job("sample")])
    assert set(found) == {"training", "sampling"}
    training = found["training"]
    assert (training.jobs, training.idle, found["sampling"].idle) == (1, 3.0, None)
    assert training.waited == pytest.approx(20.0)
    assert training.server == 70.0
    assert training.worker == pytest.approx(10.0)


def test_medians_are_of_those_that_ended_well_and_of_no_other_operation() -> None:
    ended = [job("optim_step", run_ms=ms) for ms in (1.0, 2.0, 60.0)]
    others = [
        job("optim_step", state="failed", run_ms=None),
        job("optim_step", state="running", finished_at=None, run_ms=None),
        job("save_weights", run_ms=5000.0),
    ]
    found = stages.of([*ended, *others])
    assert set(found) == {"training"}
    assert (found["training"].jobs, found["training"].server) == (3, 2.0)
    assert stages.of([]) == {}


def test_a_clock_that_was_set_back_makes_no_time_negative() -> None:
    (found,) = stages.of([job("sample", queue_ms=0.0, finished_at=8.0)]).values()
    assert (found.waited, found.worker) == (0.0, 0.0)
