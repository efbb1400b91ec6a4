"""The samples: each is sent to whatever serves sampling, and its answer journaled."""

from __future__ import annotations

from typing import Protocol

import trio

from tink import crash
from tink.actors.books import JobBooks
from tink.actors.jobs import INTERNAL, Jobs, Settle, append_end, run_to_end
from tink.domain import rows, sampling
from tink.domain.events import Entry, JobDone, JobFailed
from tink.errors import BackendError, UserError
from tink.limits import SCORES_ASIDE
from tink.wire import tink_train


class SamplingBackend(Protocol):
    """`slots`: samples that it takes at once."""

    @property
    def slots(self) -> int: ...

    async def sample(
        self, job: rows.Job, request: tink_train.SampleRequest, adapter: rows.Adapter | None
    ) -> tink_train.SampleReply:
        """Sends the request until it is answered, and journals each attempt. Raises UserError, or
        BackendError when its attempts are used up or nobody will ever take it. Cancelled, the sample may
        go on where it is, and is given up there in the end."""


class SamplerActor:
    """Runs the samples in `jobs`, and settles each with its terminal event. A sample is a pure function of
    its request, so one whose fate is unknown is simply sent again.

    `scorer` gets those that also score their prompts: the trainer beside vLLM, whose prompt logprobs are
    not to be relied upon (docs/decisions/0018). None: `backend` does."""

    def __init__(
        self,
        jobs: Jobs,
        journal: JobBooks,
        backend: SamplingBackend,
        settle: Settle,
        scorer: SamplingBackend | None = None,
    ) -> None:
        self.jobs, self._journal, self._backend, self._settle = jobs, journal, backend, settle
        self._scorer = scorer
        self._scores = trio.CapacityLimiter(scorer.slots if scorer else 1)

    async def run(self) -> None:
        await self.jobs.run(self._run_one)

    async def _run_one(self, job_id: str) -> None:
        await run_to_end(job_id, self._journal, self._run_to_its_end, self._crashed, self._settle)

    async def _run_to_its_end(self, job: rows.Job) -> None:
        await append_end(self._journal, [await self._outcome(job)])

    def _crashed(self, job: rows.Job) -> list[Entry]:
        return [(rows.about(job), JobFailed(category="server", error=INTERNAL))]

    async def _outcome(self, job: rows.Job) -> Entry:
        try:
            accepted = await self._journal.acceptance(job)
            body = await self._journal.request(job)
            adapter = await self._adapter(job)
            request = sampling.request_of(job, accepted, body, adapter)
            if self._scorer is None or not request.scores_prompt:
                reply = await self._backend.sample(job, request, adapter)
            else:
                if self._scores.statistics().tasks_waiting < SCORES_ASIDE:
                    self.jobs.step_aside(job.job_id)  # it keeps no other from being sampled
                async with self._scores:
                    reply = await self._scorer.sample(job, request, adapter)
        except UserError as error:
            return rows.about(job), JobFailed(category="user", error=str(error))
        except BackendError as error:
            return rows.about(job), JobFailed(category="server", error=str(error))
        if reply.failure is not None:
            return rows.about(job), JobFailed(category=reply.failure.category, error=reply.failure.message)
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
        return rows.about(job), done

    async def _adapter(self, job: rows.Job) -> rows.Adapter | None:
        sampler = self._journal.ledger.samplers[(str(job.sampler_id),)]
        return None if sampler.adapter_id is None else await self._journal.adapter(sampler.adapter_id)
