"""The lanes of all models: which jobs are next, and how long one waits for numbers that have not come."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import structlog
import trio

from tink.actors.books import JobBooks
from tink.actors.jobs import Jobs
from tink.domain import rows
from tink.domain.events import SeqSkipped, Subject
from tink.domain.lane import Lane
from tink.limits import FORGET_SECONDS, GAP_LOOKS, SEQ_GAP_SECONDS

log = structlog.get_logger()


@dataclass
class _Gap:
    """The first and the last of the numbers that a lane waits for, and how often it was looked for them."""

    missing: tuple[int, int]
    looks: int = 0


class Lanes:
    """The Router's, which puts jobs in; those whose turn it is are sent to `jobs`. `accepting`: the jobs on
    their way in, whenever it is looked at."""

    def __init__(self, journal: JobBooks, jobs: Jobs, accepting: Collection[str]) -> None:
        self._journal, self._jobs, self._accepting = journal, jobs, accepting
        self._lanes: dict[str, Lane] = {}
        self._gaps: dict[str, _Gap] = {}  # of the lanes that wait for numbers which have not come

    def __len__(self) -> int:
        return len(self._lanes)

    def __contains__(self, model_id: str) -> bool:
        return model_id in self._lanes

    def of(self, model_id: str) -> Lane:
        if model_id not in self._lanes:
            model = self._journal.ledger.models.get((model_id,))
            self._lanes[model_id] = Lane(model.next_seq if model is not None else 0)
        return self._lanes[model_id]

    def drop(self, model_id: str) -> None:
        """What comes for that model next finds a lane as the journal has it."""
        del self._lanes[model_id]
        self._gaps.pop(model_id, None)

    def load(self) -> list[rows.Job]:
        """Takes the lanes as the last life left them: its running jobs are next again. Returns the jobs
        whose numbers were skipped before they came: that life ended before it could say so."""
        jobs = [job for job in self._journal.ledger.jobs.values() if job.model_id]
        for job in jobs:
            if job.state == "running":
                # Of two, the later one had gone ahead.
                lane = self.of(str(job.model_id))
                lane.next_seq = min(lane.next_seq, job.seq_id)
        return [job for job in jobs if not self.of(str(job.model_id)).arrive(job.seq_id, job.job_id)]

    def resume(self) -> None:
        """Sends all whose turn it is to `jobs`, which has forgotten them."""
        for model_id, lane in self._lanes.items():
            if lane.running is not None:
                if (lane.running,) in self._journal.ledger.jobs:
                    self._jobs.send(lane.running)
                else:  # it had ended, and was not released
                    lane.finish(lane.running)
            self.advance(model_id)

    def advance(self, model_id: str) -> None:
        """Something has come or ended there."""
        lane = self.of(model_id)
        job_id = lane.start()
        if job_id is not None:
            self._jobs.send(job_id)
        missing = lane.gap()
        if missing is None:
            self._gaps.pop(model_id, None)
        elif model_id not in self._gaps or self._gaps[model_id].missing != missing:
            self._gaps[model_id] = _Gap(missing)
        following = lane.behind()
        if following is not None:
            self._jobs.expect(following)

    def release(self, job_id: str) -> None:
        """The model of that job, which has ended, is free for its next one."""
        model_id, _, _seq = job_id.rpartition(":")
        lane = self._lanes.get(model_id)
        if lane is not None and lane.running == job_id:
            lane.finish(job_id)
            self.advance(model_id)

    async def run(self) -> None:
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._forget_now_and_then)
            self._nursery.start_soon(self._look_for_gaps)

    async def _look_for_gaps(self) -> None:
        """Skips numbers that do not come while later ones wait."""
        while True:
            await trio.sleep(SEQ_GAP_SECONDS / GAP_LOOKS)
            for model_id, gap in list(self._gaps.items()):
                gap.looks += 1
                if any(job_id.startswith(f"{model_id}:") for job_id in self._accepting):
                    gap.looks = 0
                elif gap.looks > GAP_LOOKS:  # the first came at any time after the gap
                    del self._gaps[model_id]
                    # Before the commit: what comes now comes too late.
                    self.of(model_id).skip(gap.missing[1])
                    self._nursery.start_soon(self._skipped, model_id, *gap.missing)

    async def _skipped(self, model_id: str, first: int, last: int) -> None:
        log.warning("sequence numbers skipped", model=model_id, first=first, last=last)
        await self._journal.append((Subject(model_id=model_id), SeqSkipped(first=first, last=last)))
        self.advance(model_id)

    async def _forget_now_and_then(self) -> None:
        while True:
            await trio.sleep(FORGET_SECONDS)
            self._forget()

    def _forget(self) -> None:
        """What has ended leaves the memory: the journal has it."""
        busy = {("models", model_id) for model_id, lane in self._lanes.items() if not lane.idle}
        self._journal.present.forget(busy)
        coming = {job_id.rpartition(":")[0] for job_id in self._accepting}
        models = self._journal.ledger.models
        for model_id, lane in list(self._lanes.items()):
            if lane.idle and (model_id,) not in models and model_id not in coming:
                del self._lanes[model_id]
