"""What /metrics says is what the journal's events say."""

from __future__ import annotations

from typing import Any

import pytest

from tink.domain.events import (
    AnyEvent,
    Diverged,
    JobAccepted,
    JobCancelled,
    JobDone,
    JobFailed,
    JobStarted,
    Record,
    SnapshotDropped,
    SnapshotTaken,
    Subject,
    TrainerStarted,
)
from tink.domain.ledger import Ledger
from tink.domain.projection import project
from tink.metrics import Metrics

SNAPSHOT: dict[str, Any] = {"op_no": 1, "directory": "d", "size_bytes": 1}


class Counted:
    """A ledger and the metrics beside it, as the journal feeds them."""

    def __init__(self, diverged: int = 0) -> None:
        self.ledger = Ledger()
        self.metrics = Metrics(self.ledger, diverged)
        self._seq = 0

    def happen(self, event: AnyEvent, job: str | None = None) -> None:
        self._seq += 1
        record = Record(
            seq=self._seq, at=1.0, incarnation=1, subject=Subject(tenant="t", job_id=job), event=event
        )
        self.metrics.observe(record)
        self.ledger.apply(project(record))

    def of(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


def _accepted(op: Any) -> JobAccepted:
    return JobAccepted(op=op, seq_id=None, request="{}")


def test_jobs_are_counted_by_operation_and_end() -> None:
    counted = Counted()
    ends: list[AnyEvent] = [
        JobDone(run_ms=300.0),
        JobFailed(category="user", error="no"),
        JobCancelled(),
    ]
    for number, end in enumerate([*ends, None]):
        counted.happen(_accepted("sample"), f"job-{number}")
        counted.happen(JobStarted(attempt=1, backend="trainer"), f"job-{number}")
        if end is not None:
            counted.happen(end, f"job-{number}")
    counted.happen(JobStarted(attempt=2, backend="trainer"), "job-3")
    assert counted.of("tink_jobs_accepted_total", op="sample") == 4
    assert counted.of("tink_job_attempts_total", op="sample") == 5
    for state in ("done", "failed", "cancelled"):
        assert counted.of("tink_jobs_ended_total", op="sample", state=state) == 1
    assert counted.of("tink_jobs_open", op="sample", state="running") == 1
    assert counted.of("tink_job_run_seconds_sum", op="sample") == 0.3
    assert counted.of("tink_job_run_seconds_bucket", op="sample", le="0.25") == 0
    assert counted.of("tink_job_run_seconds_bucket", op="sample", le="0.5") == 1


def test_the_trainer_is_idle_for_as_long_as_a_job_waited_for_it() -> None:
    counted = Counted()
    for job, queue_ms, idle_ms in (("a", 10.0, 60_000.0), ("b", 3_000.0, 20.0), ("c", 5.0, None)):
        counted.happen(_accepted("forward_backward"), job)
        counted.happen(JobStarted(attempt=1, backend="trainer", queue_ms=queue_ms), job)
        counted.happen(JobDone(run_ms=1.0, idle_ms=idle_ms), job)
    assert counted.of("tink_trainer_idle_seconds_sum") == pytest.approx(0.03)
    assert counted.of("tink_trainer_idle_seconds_count") == 2
    assert counted.of("tink_job_queue_seconds_sum", op="forward_backward") == pytest.approx(3.015)


def test_what_diverged_is_counted_over_the_whole_journal() -> None:
    counted = Counted(diverged=2)
    assert counted.of("tink_diverged_total") == 2
    counted.happen(_accepted("forward"), "job")
    counted.happen(Diverged(op_no=1, detail="another loss"), "job")
    assert counted.of("tink_diverged_total") == 3


def test_trainers_and_snapshots_are_counted() -> None:
    counted = Counted()
    started = TrainerStarted(incarnation="one", engine="hf", base_model="m", base_digest="0")
    counted.happen(started)
    for number in range(2):
        counted.happen(SnapshotTaken(snapshot_id=str(number), **SNAPSHOT))
    counted.happen(SnapshotDropped(snapshot_id="0", reason="pruned"))
    counted.happen(SnapshotDropped(snapshot_id="1", reason="damaged"))
    assert counted.of("tink_trainer_lives_total") == 1
    assert counted.of("tink_snapshots_taken_total") == 2
    assert counted.of("tink_snapshots_damaged_total") == 1


def test_the_exposition_is_prometheus_text() -> None:
    lines = Counted().metrics.exposition().decode().splitlines()
    assert "# TYPE tink_diverged_total counter" in lines
    assert "tink_diverged_total 0.0" in lines
