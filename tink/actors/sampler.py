"""Sampling on the training server's own engine, when no vLLM is configured."""

from __future__ import annotations

import structlog
import trio

from tink import crash
from tink.actors import plans
from tink.actors.attempts import Attempts
from tink.actors.jobs import Jobs
from tink.actors.settling import Settle, request_of
from tink.actors.trainer_link import TrainerLink
from tink.backends.trainer import Refused, TrainerGone
from tink.domain import rows
from tink.domain.events import JobDone, JobFailed, JobStarted
from tink.errors import BackendError, JournalUnavailable, StartupError, UserError
from tink.journal.journal import Entry, Journal
from tink.limits import SAMPLE_SLOTS
from tink.trainer import protocol
from tink.world import World

log = structlog.get_logger()


class SamplerActor:
    """Runs the samples in `jobs`, and settles each with its terminal event. A sample is a pure function of
    its request, so one whose fate is unknown is simply sent again."""

    def __init__(
        self, journal: Journal, link: TrainerLink, settle: Settle, world: World, *, max_attempts: int
    ) -> None:
        self._journal, self._link, self._settle, self._world = journal, link, settle, world
        self._max_attempts = max_attempts
        self.jobs = Jobs(SAMPLE_SLOTS)

    async def run(self) -> None:
        await self.jobs.run(self._run_one)

    async def _run_one(self, job_id: str) -> None:
        job = self._journal.ledger.table("jobs", rows.Job).get((job_id,))
        if job is None:
            return  # it was sent twice, and has ended
        try:
            entry = await self._outcome(job)
        except (JournalUnavailable, StartupError):
            raise
        except Exception:
            # A bug that this job met: it fails, and the others go on.
            log.exception("job crashed", job=job_id)
            internal = "internal error in the worker: its log has it"
            entry = plans.subject(job), JobFailed(category="server", error=internal)
        # Shielded: whoever takes the job up again must know whether it has ended.
        with trio.CancelScope(shield=True):
            await self._journal.append(entry)
        crash.point("worker.ended")
        await self._settle(job_id)

    async def _outcome(self, job: rows.Job) -> Entry:
        try:
            accepted = await self._journal.acceptance(job)
            body = await request_of(self._journal, job)
            request = plans.sampling(job, accepted, body, await self._adapter(job))
            reply = await self._send(job, request)
        except UserError as error:
            return plans.subject(job), JobFailed(category="user", error=str(error))
        except BackendError as error:
            return plans.subject(job), JobFailed(category="server", error=str(error))
        if reply.failure is not None:
            return plans.subject(job), JobFailed(
                category=reply.failure.category, error=reply.failure.message
            )
        crash.point("worker.answered")
        digest = await self._journal.bodies.put(reply.body)
        crash.point("worker.result")
        done = JobDone(
            result_sha256=digest,
            result_bytes=len(reply.body),
            tokens_in=reply.tokens_in,
            tokens_out=reply.tokens_out,
            run_ms=reply.run_ms,
        )
        return plans.subject(job), done

    async def _adapter(self, job: rows.Job) -> rows.Adapter | None:
        sampler = self._journal.ledger.table("samplers", rows.Sampler)[(str(job.sampler_id),)]
        return None if sampler.adapter_id is None else await self._journal.adapter(sampler.adapter_id)

    async def _send(self, job: rows.Job, request: protocol.SampleRequest) -> protocol.SampleReply:
        """Raises BackendError when the job's attempts are used up, or the server will never take it."""

        async def begin() -> None:
            started = JobStarted(attempt=job.attempts + 1, backend="trainer")
            await self._journal.append((plans.subject(job), started))

        attempts = Attempts(self._link, job, begin, most=self._max_attempts)
        while True:
            try:
                async with attempts.call() as life:
                    return await life.client.sample(request)
            except TrainerGone as error:
                log.warning("sampling call lost", job=job.job_id, reason=str(error))
                self._link.lost(life)
            except Refused as error:
                if error.invalid:
                    raise
                log.warning("sampling call refused", job=job.job_id, reason=str(error))
                # Busy, or the answer was kept for us no longer: the same request again, of the same life.
                if error.refusal.error not in ("busy", "no_sample"):
                    self._link.lost(life)
