"""Sampling on the training server's own engine, when no vLLM is configured."""

from __future__ import annotations

import structlog
import trio

from tink import crash
from tink.actors import plans
from tink.actors.attempts import Attempts
from tink.actors.mailbox import Mailbox
from tink.actors.settling import Settle, request_of
from tink.actors.trainer_link import TrainerLink
from tink.backends.trainer import Refused, TrainerGone
from tink.domain import rows
from tink.domain.events import JobDone, JobFailed, JobStarted
from tink.errors import BackendError, JournalUnavailable, StartupError, UserError
from tink.journal.journal import Entry, Journal
from tink.limits import MAX_OPEN_JOBS, SAMPLE_SLOTS
from tink.trainer import protocol
from tink.world import World

log = structlog.get_logger()


class SamplerActor:
    """Runs the samples that `mailbox` names, and settles each with its terminal event. A sample is a pure
    function of its request, so one whose fate is unknown is simply sent again."""

    def __init__(
        self, journal: Journal, link: TrainerLink, settle: Settle, world: World, *, max_attempts: int
    ) -> None:
        self._journal, self._link, self._settle, self._world = journal, link, settle, world
        self._max_attempts = max_attempts
        self._slots = trio.CapacityLimiter(SAMPLE_SLOTS)
        self._begun: set[str] = set()
        self._withdrawn: set[str] = set()
        self.mailbox: Mailbox[str] = Mailbox(MAX_OPEN_JOBS)

    def withdraw(self, job_id: str) -> bool:
        """Takes a job back that has not been begun; False if it has."""
        if job_id in self._begun:
            return False
        self._withdrawn.add(job_id)
        return True

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            async for job_id in self.mailbox:
                token = object()
                await self._slots.acquire_on_behalf_of(token)
                nursery.start_soon(self._run_one, job_id, token)

    async def _run_one(self, job_id: str, token: object) -> None:
        try:
            if job_id in self._withdrawn:
                self._withdrawn.discard(job_id)
                return
            self._begun.add(job_id)
            job = self._journal.ledger.table("jobs", rows.Job)[(job_id,)]
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
        finally:
            self._begun.discard(job_id)
            self._slots.release_on_behalf_of(token)
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
