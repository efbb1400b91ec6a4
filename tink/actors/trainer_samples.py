"""Sampling on the training server's own engine, when no vLLM is configured."""

from __future__ import annotations

import structlog

from tink.actors.attempts import Attempts
from tink.actors.link import Link
from tink.backends.trainer import TrainerGone, TrainerRefused
from tink.domain import rows
from tink.domain.events import JobStarted
from tink.journal.journal import Journal
from tink.limits import SAMPLE_SLOTS
from tink.wire import tink_train
from tink.world import World

log = structlog.get_logger()


class TrainerSamples:
    """A SamplingBackend."""

    slots = SAMPLE_SLOTS

    def __init__(self, journal: Journal, link: Link, world: World, *, max_attempts: int) -> None:
        self._journal, self._link, self._world = journal, link, world
        self._max_attempts = max_attempts

    async def sample(
        self, job: rows.Job, request: tink_train.SampleRequest, adapter: rows.Adapter | None
    ) -> tink_train.SampleReply:
        """The trainer knows the adapter by its directory, which the request names."""

        async def begin() -> None:
            started = JobStarted(
                attempt=job.attempts + 1, backend="trainer", queue_ms=job.queued_ms(self._world.now())
            )
            await self._journal.append((rows.about(job), started))

        attempts = Attempts(self._link, job, begin, most=self._max_attempts)
        while True:
            try:
                async with attempts.call() as life:
                    return await life.client.sample(request)
            except TrainerGone as error:
                log.warning("sampling call lost", job=job.job_id, reason=str(error))
                self._link.lost(life)
            except TrainerRefused as error:
                if error.invalid:
                    raise
                log.warning("sampling call refused", job=job.job_id, reason=str(error))
                # Busy, or the answer was kept for us no longer: the same request again, of the same life.
                if error.refusal.error not in ("busy", "no_sample"):
                    self._link.lost(life)
