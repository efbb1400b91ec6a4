"""The training lane: sends one operation after another to the training server, whatever its engine.

A slot is one operation that has its turn: one for Megatron, MAX_WORKERS for the HuggingFace engine. The
router hands it at most one job of a model at a time, so the queue is fair between models by its order
alone: a model's next job joins at the end.

While operations run, those that are next go ahead to the server (ahead.py).

A server that has lost state (it was restarted) is brought up to date before anything new is sent: the
model's journaled operations since are applied again, in order, and compared with what they gave.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from functools import partial

import structlog
import trio

from tink import crash
from tink.actors import placements
from tink.actors.ahead import Ahead, Sent
from tink.actors.artifacts import ArtifactFolder
from tink.actors.attempts import Attempts
from tink.actors.beginnings import Beginnings
from tink.actors.books import JobBooks
from tink.actors.jobs import INTERNAL, Jobs, Release, Settle, append_end, run_to_end
from tink.actors.link import Life, Link
from tink.actors.redo import Redo
from tink.actors.snapshots import Snapshots
from tink.backends.trainer import TrainerGone, TrainerRefused
from tink.domain import plans, rows
from tink.domain.events import Diverged, Entry, JobDone, JobFailed
from tink.domain.requests import MUTATING
from tink.errors import BackendError, UserError
from tink.wire import tink_train
from tink.world import World

# Returns the servers that have the version now. Raises BackendError.
Place = Callable[[rows.Adapter], Awaitable[list[str]]]

log = structlog.get_logger()


class MegatronActor:
    """Runs the training jobs in `jobs`, and settles each with its terminal event."""

    def __init__(
        self,
        jobs: Jobs,
        journal: JobBooks,
        link: Link,
        settle: Settle,
        release: Release,
        beginnings: Beginnings,
        snapshots: Snapshots,
        folder: ArtifactFolder,
        world: World,
        *,
        alpha: float,
        max_attempts: int,
        place: Place | None = None,
    ) -> None:
        """`place`: gives a new adapter version to the sampling servers; None: the training server samples,
        from the artifact folder."""
        self.jobs, self._journal, self._link, self._world = jobs, journal, link, world
        self._settle, self._release = settle, release
        self._beginnings, self._snapshots, self._folder = beginnings, snapshots, folder
        self._redo = Redo(journal, snapshots, world)
        self._alpha, self._max_attempts, self._place = alpha, max_attempts, place
        self._ahead = Ahead(journal, link, jobs, snapshots, world, alpha=alpha)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._ahead.run)
            await self.jobs.run(self._run_one)

    async def _run_one(self, job_id: str) -> None:
        run = partial(self._run_to_its_end, begun_in=self._beginnings.take(job_id))
        job = await run_to_end(job_id, self._journal, run, self._crashed, self._settle)
        if job is None:
            return
        self._ahead.turn_over(job)
        if job.state == "done" and job.op in MUTATING:
            between = self._model(job).op_no == job.op_no
            await self._snapshots.consider(self._link.present, job, between=between)
        elif job.state == "done" and job.op == "unload_model":
            self._snapshots.forget(str(job.model_id))
        await self._release(job_id)

    async def _run_to_its_end(self, job: rows.Job, begun_in: str | None) -> None:
        """`begun_in`: the life in which it began with its acceptance, without being sent."""
        # Two who want one address or one sampler number: whoever commits first has it.
        names = job.op.startswith("save_weights")
        accepted = await self._journal.acceptance(job)
        async with self._journal.recalled(plans.named(job, accepted.request)):
            end = await self._outcome(job, begun_in)
            async with self._journal.naming if names else nullcontext():
                try:
                    entries = end()
                except UserError as error:
                    entries = [self._failed(job, error.category, str(error))]
                await append_end(self._journal, entries)

    def _crashed(self, job: rows.Job) -> list[Entry]:
        entries = [self._failed(job, "server", INTERNAL)]
        if job.op_no is not None:
            detail = "the worker failed while the job ran: whether it was applied is not known"
            entries.append((rows.about(job), Diverged(op_no=job.op_no, detail=detail)))
        return entries

    async def _outcome(self, job: rows.Job, begun_in: str | None) -> Callable[[], list[Entry]]:
        """Runs the job. The call that it returns gives the events that end it, the terminal one first;
        or raises UserError."""
        sent = await self._ahead.take(job)
        life = sent.life if sent is not None else await self._link.life()
        context = self._context(life)
        try:
            plan = sent.plan if sent is not None else None
            if plan is None:
                life.require_training()
                body = await self._journal.request(job)
                plan = plans.training(job, body, job.op_no or self._model(job).op_no + 1, context)
        except (UserError, BackendError) as error:
            failed = [self._failed(job, error.category, str(error))]
            return lambda: failed
        try:
            # What it reads or writes stays, from now until its row says so.
            with self._folder.use(plan.directory), self._folder.use(plan.export):
                reply = sent.reply if sent is not None else None
                if reply is None:
                    reply = await self._send(job, plan, sent, begun_in)
                crash.point("worker.answered")
                if reply.failure is not None:
                    failed = [self._failed(job, reply.failure.category, reply.failure.message)]
                    return lambda: failed
                result = reply.result
                assert result is not None, "a done op has a result"
                if result.files:
                    crash.point("worker.published")
                adapter = plans.exported(job, plan, result, context, self._world.now())
                placed = await self._placements(job, adapter)
        except BackendError as error:
            failed = [self._failed(job, "server", str(error))]
            return lambda: failed
        digest = await self._journal.bodies.put(result.body) if result.body else None
        crash.point("worker.result")

        def end() -> list[Entry]:
            now = self._world.now()
            answer, more = plans.conclusion(job, plan, result, context, now, adapter)
            done = JobDone(
                result=answer,
                result_sha256=digest,
                result_bytes=len(result.body),
                tokens_in=result.tokens,
                loss_sum=result.loss,
                metrics=result.metrics,
                run_ms=result.run_ms,
                idle_ms=result.idle_ms,
                queue_ms=(job.queue_ms or 0.0) + result.queued_ms if result.queued_ms else None,
                step=plans.step(job, context.ledger),
                learning_rate=plans.learning_rate(plan),
            )
            return [(rows.about(job), done), *placed, *more]

        return end

    async def _placements(self, job: rows.Job, adapter: rows.Adapter | None) -> list[Entry]:
        """The events of an adapter version that the job has written, once it can be sampled."""
        if adapter is None:
            return []
        if self._place is None:
            # The trainer samples from the artifact folder: what is published there, it can serve.
            replicas = [placements.TRAINER]
        else:
            # It may wait for a server to come: others train meanwhile.
            self.jobs.step_aside(job.job_id)
            replicas = await self._place(adapter)
        crash.point("worker.placed")
        return plans.exported_events(job, adapter, replicas)

    async def _begin_attempt(self, job: rows.Job, op_no: int, plan: plans.Plan) -> None:
        await self._journal.append(plans.started(job, op_no, plan, self._world.now()))

    def _failed(self, job: rows.Job, category: str, error: str) -> Entry:
        failed = JobFailed(
            category="user" if category == "user" else "server",
            error=error,
            # One that was begun has consumed it, and the next one may have begun since.
            seq_id=job.seq_id if job.op_no is None or job.seq_id == 0 else None,
        )
        return rows.about(job), failed

    def _context(self, life: Life) -> plans.Context:
        return plans.Context(self._journal.ledger, life.info, self._alpha, exports=self._place is not None)

    def _model(self, job: rows.Job) -> rows.Model:
        return self._journal.ledger.models[(job.model_id,)]

    # -- talking to the server ----------------------------------------------------------------------

    async def _send(
        self, job: rows.Job, plan: plans.Plan, ahead: Sent | None, begun_in: str | None
    ) -> tink_train.OpReply:
        """Sends the op until it is answered. A call whose fate is unknown is asked for again by its op_no;
        a server that came back without its state is brought up to date first, and one that knows another
        history is replaced. Raises BackendError when the job's attempts are used up, or the op is one that
        the server will never take. `ahead`: how it was sent before its turn; `begun_in`: the life in which
        it began without being sent."""
        model_id, op_no = str(job.model_id), job.op_no or self._model(job).op_no + 1
        begin = partial(self._begin_attempt, job, op_no, plan)
        attempts = Attempts(
            self._link,
            job,
            begin,
            most=self._max_attempts,
            begun_in=begun_in if ahead is None else ahead.life.incarnation,
            innocent=begun_in is not None if ahead is None else not ahead.in_turn,
        )
        while True:
            try:
                async with attempts.call() as life:
                    if isinstance(plan.op, tink_train.RemoveModel) and not life.applied.get(model_id):
                        # It was in another life.
                        return tink_train.OpReply(
                            "done", life.incarnation, model_id, op_no, op_no, result=tink_train.OpResult()
                        )
                    if not isinstance(plan.op, tink_train.RemoveModel):  # which needs nothing of the redo
                        await self._redo.bring_up(life, model_id, op_no - 1)
                    self._ahead.turn(job, life)
                    reply = await life.client.op(life.request(job, op_no, plan.op, acked=op_no - 1))
                    if isinstance(plan.op, tink_train.RemoveModel):
                        life.applied.pop(model_id, None)
                    else:
                        life.applied[model_id] = max(op_no, life.applied.get(model_id, 0))
                    return reply
            except TrainerGone as error:
                log.warning("training call lost", job=job.job_id, reason=str(error))
                if self._ahead.is_out(life):
                    attempts.excuse()
                self._link.lost(life)
            except TrainerRefused as error:
                log.warning("training call refused", job=job.job_id, reason=str(error))
                if error.invalid:
                    raise
                if error.contradicts:
                    self._link.replace(life, f"it contradicts the journal: {error}")
                elif error.refusal.error == "gap":
                    life.applied[model_id] = error.refusal.applied or 0
                elif error.refusal.error == "no_model":
                    life.applied.pop(model_id, None)
                elif error.refusal.error != "busy":
                    self._link.lost(life)
