"""From where a model's training can be replayed, with what is left of it: asked of the same schedule that a
replay follows, so that what is said beforehand is what will be."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import msgspec

from tink import manifest
from tink.domain import rows
from tink.domain.retention import ENDED
from tink.errors import UserError
from tink.journal import queries
from tink.journal.recording import Recording
from tink.replay.training import Schedule, schedule, steps_of


class Remains(msgspec.Struct, frozen=True):
    """What is left of a model. `jobs`: those with a number, in order. `stored`: of their bodies those that
    are there. `snapshots`: those that can be used, the oldest first. `lost`: by job, what of it is not."""

    jobs: list[rows.Job]
    stored: set[str]
    snapshots: list[rows.Snapshot]
    lost: dict[str, str]


def remains(
    recording: Recording, artifacts: Path, model: rows.Model, *, without: Collection[str] = frozenset()
) -> Remains:
    """`without`: the sha256 of bodies and the names of directories that count as gone. Blocks."""

    def present(directory: str) -> bool:
        return directory not in without and manifest.present(artifacts, directory)

    jobs = queries.ops(recording.journal, model.model_id, after=0, upto=model.op_no)
    digests = {d for job in jobs for d in (job.body_sha256, job.result_sha256) if d is not None}
    stored = recording.stored(digests).difference(without)
    lost = {}
    for job in jobs:
        if job.body_sha256 is not None and job.body_sha256 not in stored:
            lost[job.job_id] = "its request was pruned"
        elif job.op == "load_weights" and job.state == "done" and not present(str(job.directory)):
            lost[job.job_id] = f"the state that it loaded is not in {artifacts} any more"
    taken = queries.snapshots(recording.journal, model.model_id)
    return Remains(jobs, stored, [one for one in taken if present(one.directory)], lost)


class Reach(msgspec.Struct, frozen=True, kw_only=True):
    """How far back a replay of the last of a model's `steps` optimizer steps can begin. `schedule`: what it
    would do; None if it cannot be. `ended`: the model will have no other snapshot. `because`: why not from
    its start."""

    model_id: str
    steps: int
    schedule: Schedule | None
    ended: bool
    because: str | None

    @property
    def told(self) -> str:
        if self.schedule is None:
            return "not at all" if self.ended else "not at all until its next snapshot"
        start = self.schedule.start
        if start is None:
            return "from its start"
        begun = f"step {self.schedule.begun} of {self.steps}"
        return f"from the snapshot behind operation {start.op_no} ({begun})"


def reach(model: rows.Model, left: Remains) -> Reach | None:
    """None for a model that has no optimizer step yet: there is nothing to replay."""
    steps = steps_of(left.jobs)
    if not steps:
        return None
    made: Schedule | None = None
    try:
        made = schedule(left.jobs, left.snapshots, left.lost, model_id=model.model_id)
        because = made.because
    except UserError as error:
        because = str(error)
    ended = model.state in ENDED
    return Reach(model_id=model.model_id, steps=steps, schedule=made, ended=ended, because=because)
