"""Where the time of the last jobs went, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

import msgspec

from tink.domain import rows

# The operations of a step, and samples: what a run waits for again and again.
GROUPS = {"training": ("forward", "forward_backward", "optim_step"), "sampling": ("sample",)}


class Stages(msgspec.Struct, kw_only=True):
    """Of so many `jobs`, milliseconds at the median. `waited`: from the promise until its turn at its
    server; `server`: computed there; `worker`: the rest, until the result was durable; `idle`: how long the
    trainer had had nothing to do before it."""

    jobs: int
    waited: float
    server: float
    worker: float
    idle: float | None = None


def of(jobs: Sequence[rows.Job]) -> dict[str, Stages]:
    """Of those that have ended well, by group; without a group that has none."""
    return dict(_groups(jobs))


def _groups(jobs: Sequence[rows.Job]) -> Iterator[tuple[str, Stages]]:
    for group, ops in GROUPS.items():
        taken = [job for job in jobs if job.op in ops and job.state == "done"]
        times = [found for job in taken if (found := _times(job)) is not None]
        if not times:
            continue
        waited, server, worker = (median(each) for each in zip(*times, strict=True))
        idle = [job.idle_ms for job in taken if job.idle_ms is not None]
        yield (
            group,
            Stages(
                jobs=len(times),
                waited=waited,
                server=server,
                worker=worker,
                idle=median(idle) if idle else None,
            ),
        )


def _times(job: rows.Job) -> tuple[float, float, float] | None:
    if job.queue_ms is None or job.finished_at is None or job.run_ms is None:
        return None
    whole = max(0.0, job.finished_at - job.submitted_at) * 1000
    return job.queue_ms, job.run_ms, max(0.0, whole - job.queue_ms - job.run_ms)
