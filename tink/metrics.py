"""What the worker counts, for Prometheus: a fold of the journal's events, so that it tells the same story.
Counters begin with the process, as Prometheus expects, but for `tink_diverged_total`, which is of the
whole journal: a divergence that happened just before a crash must not be missed."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from tink.domain import events, rows
from tink.domain.ledger import Ledger
from tink.limits import IDLE_SECONDS_BUCKETS, RUN_SECONDS_BUCKETS

# A second series beside each counter, which Prometheus does not use.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """`ledger`: where open jobs are. `diverged`: how many such events the journal has already."""

    def __init__(self, ledger: Ledger, diverged: int) -> None:
        self._ledger = ledger
        self.registry = registry = CollectorRegistry()
        self._accepted = Counter("tink_jobs_accepted", "Jobs accepted.", ["op"], registry=registry)
        self._attempts = Counter(
            "tink_job_attempts", "Jobs sent to a backend, each new attempt.", ["op"], registry=registry
        )
        self._ended = Counter("tink_jobs_ended", "Jobs ended.", ["op", "state"], registry=registry)
        self._run = Histogram(
            "tink_job_run_seconds",
            "How long jobs that are done ran in the backend.",
            ["op"],
            registry=registry,
            buckets=RUN_SECONDS_BUCKETS,
        )
        self._queue = Histogram(
            "tink_job_queue_seconds",
            "How long jobs waited before they were sent to a backend.",
            ["op"],
            registry=registry,
            buckets=RUN_SECONDS_BUCKETS,
        )
        self._idle = Histogram(
            "tink_trainer_idle_seconds",
            "How long the training server had nothing to do while the job that it did next was waiting.",
            registry=registry,
            buckets=IDLE_SECONDS_BUCKETS,
        )
        self._diverged = Counter(
            "tink_diverged",
            "Redone results that differ from the journaled ones, in the whole journal.",
            registry=registry,
        )
        self._diverged.inc(diverged)
        self._trainers = Counter(
            "tink_trainer_lives", "Lives of the training server that answered.", registry=registry
        )
        self._snapshots = Counter("tink_snapshots_taken", "Snapshots taken.", registry=registry)
        self._damaged = Counter(
            "tink_snapshots_damaged", "Snapshots given up as damaged.", registry=registry
        )
        registry.register(_OpenJobs(ledger))
        ProcessCollector(registry=registry)

    def observe(self, record: events.Record) -> None:
        """A committed event, before the ledger has taken it in."""
        event, job_id = record.event, record.subject.job_id
        match event:
            case events.JobAccepted():
                self._accepted.labels(event.op).inc()
            case events.JobStarted():
                op = self._job(job_id).op
                self._attempts.labels(op).inc()
                if event.attempt == 1 and event.queue_ms is not None:
                    self._queue.labels(op).observe(event.queue_ms / 1000)
            case events.JobDone():
                job = self._job(job_id)
                self._ended.labels(job.op, "done").inc()
                self._run.labels(job.op).observe(event.run_ms / 1000)
                waited = event.queue_ms or job.queue_ms
                if event.idle_ms is not None and waited is not None:
                    self._idle.observe(min(event.idle_ms, waited) / 1000)
            case events.JobFailed():
                self._ended.labels(self._job(job_id).op, "failed").inc()
            case events.JobCancelled():
                self._ended.labels(self._job(job_id).op, "cancelled").inc()
            case events.Diverged():
                self._diverged.inc()
            case events.TrainerStarted():
                self._trainers.inc()
            case events.SnapshotTaken():
                self._snapshots.inc()
            case events.SnapshotDropped(reason="damaged"):
                self._damaged.inc()

    def exposition(self) -> bytes:
        """Prometheus's text format, version 0.0.4."""
        return generate_latest(self.registry)

    def _job(self, job_id: str | None) -> rows.Job:
        return self._ledger.jobs[(job_id,)]


class _OpenJobs(Collector):
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def collect(self) -> Iterable[GaugeMetricFamily]:
        family = GaugeMetricFamily("tink_jobs_open", "Jobs that have not ended.", labels=["op", "state"])
        jobs = self._ledger.jobs.values()
        tally = Tally((job.op, job.state) for job in jobs if not job.ended)
        for (op, state), number in sorted(tally.items()):
            family.add_metric([op, state], number)
        yield family
