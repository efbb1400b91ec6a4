"""The next operation is at the training server before its turn: while one runs, the job that is next is
journaled as begun and sent, and the server, which keeps the order, goes from one to the other without a
pause. Its turn finds the answer, or the call still out.

Only batches and steps go ahead, as many as there are slots, and only behind what cannot change what they
are: everything else, and all that begins again, has its turn first. A job that was ahead when its server
died is as one that was never sent, but for its number; its turn sends it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import structlog
import trio

from tink import crash
from tink.actors.books import JobBooks
from tink.actors.jobs import Jobs
from tink.actors.link import Life, Link
from tink.actors.snapshots import Snapshots
from tink.backends.trainer import TrainerRefused
from tink.domain import plans, rows
from tink.domain.requests import DATA_OPS
from tink.errors import BackendError, JournalUnavailable, StartupError, UserError
from tink.limits import OVERTAKEN_SECONDS
from tink.wire.tink_train import OpReply
from tink.world import World

log = structlog.get_logger()

# What they do, and whether they can be done, is told by their requests alone.
SENT_AHEAD = frozenset({*DATA_OPS, "optim_step"})
# Behind these the model is the same one, whatever becomes of them.
FOLLOWED = SENT_AHEAD | {"save_weights", "save_weights_for_sampler", "save_weights_external"}


@dataclass
class Sent:
    """A job that goes ahead. `begun`: it is journaled as begun, in `life`. `reply`: None while it is out,
    and of a call whose fate is unknown; of one that was lost `in_turn`, the job may be the reason."""

    job: rows.Job
    life: Life
    plan: plans.Plan | None = None
    begun: bool = False
    in_turn: bool = False
    reply: OpReply | None = None
    ended: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class Ahead:
    """`run` sends. The actor that runs the jobs says which has its turn (`turn`, `turn_over`), and finds
    with `take` what was done for it before."""

    def __init__(
        self,
        journal: JobBooks,
        link: Link,
        jobs: Jobs,
        snapshots: Snapshots,
        world: World,
        *,
        alpha: float,
    ) -> None:
        self._journal, self._link, self._jobs = journal, link, jobs
        self._snapshots, self._world, self._alpha = snapshots, world, alpha
        self._sent: dict[str, Sent] = {}
        # By model: the job that has its turn, once it is sent, and the life that has it.
        self._turns: dict[str, tuple[rows.Job, Life]] = {}

    async def run(self) -> None:
        """For ever."""
        self._sent.clear()
        self._turns.clear()
        async with trio.open_nursery() as nursery:
            while True:
                sent = self._next()
                if sent is None:
                    await self._jobs.changed()
                else:
                    self._sent[sent.job.job_id] = sent
                    nursery.start_soon(self._send, sent)

    def turn(self, job: rows.Job, life: Life) -> None:
        """The operation of that job, which has its turn, is being sent to this life."""
        self._turns[str(job.model_id)] = job, life
        self._jobs.wake()

    def turn_over(self, job: rows.Job) -> None:
        """Until the next turn nothing of that model is sent ahead."""
        self._turns.pop(str(job.model_id), None)

    def is_out(self, life: Life) -> bool:
        """Whether an operation that is ahead in that life may be its death."""
        return any(
            sent.begun and sent.reply is None and _same(sent.life, life) for sent in self._sent.values()
        )

    async def take(self, job: rows.Job) -> Sent | None:
        """What was done for the job whose turn has come, once it is known what became of it; None if it was
        not begun."""
        sent = self._sent.pop(job.job_id, None)
        if sent is None:
            return None
        sent.in_turn = not sent.ended.is_set()
        if sent.begun:
            self.turn(job, sent.life)
        else:
            sent.scope.cancel()
        await sent.ended.wait()
        if not _same(sent.life, self._link.present):
            # In another life the one before it may have ended otherwise.
            sent.reply = None
        return sent if sent.begun else None

    # -- the inside ---------------------------------------------------------------------------------

    def _next(self) -> Sent | None:
        """One to send now. Nothing overtakes a job that waits for a slot."""
        life = self._link.present
        if life is None or sum(not sent.ended.is_set() for sent in self._sent.values()) >= self._jobs.slots:
            return None
        for job_id in self._jobs.coming():
            sent = self._sent.get(job_id)
            if sent is not None and sent.begun:
                continue
            job = self._journal.ledger.jobs.get((job_id,))
            if sent is None and job is not None and self._may_go(job, life):
                return Sent(job, life)
            if self._jobs.waits(job_id):
                return None
        return None

    def _may_go(self, job: rows.Job, life: Life) -> bool:
        """Whether all operations of its model before it are done, or run, in this life."""
        model_id = str(job.model_id)
        if job.op not in SENT_AHEAD or job.attempts or not life.info.trains:
            return False
        if any(sent.job.model_id == model_id for sent in self._sent.values() if sent.job is not job):
            return False
        model = self._journal.ledger.models.get((model_id,))
        if model is None or model.state != "live":
            return False
        if self._jobs.waits(job.job_id):  # for a slot alone, and so it is to wait there
            orderly = life.info.slots is not None and life.info.slots <= self._jobs.slots
            # It would be in the way of a snapshot.
            due = any(self._snapshots.is_due(job) for job, _ in self._turns.values())
            return orderly and not due and life.applied.get(model_id, 0) == model.op_no
        if model_id not in self._turns:
            return False
        before, where = self._turns[model_id]
        return (
            _same(where, life)
            and before.op in FOLLOWED
            and before.op_no == model.op_no
            and not self._snapshots.is_due(before)
        )

    async def _send(self, sent: Sent) -> None:
        job, life = sent.job, sent.life
        try:
            with sent.scope:
                body = await self._journal.request(job)
                async with self._link.exposure(alone=False):
                    if self._link.present is life and self._may_go(job, life):
                        await self._call(sent, body)
                    else:  # not now
                        self._sent.pop(job.job_id, None)
        except UserError as error:
            # Its turn tells whoever has sent it.
            log.info("not sent ahead", job=job.job_id, reason=str(error))
        except BackendError as error:
            # Its turn finds out what that means, and whether the server is lost.
            log.warning("training call ahead lost", job=job.job_id, reason=str(error))
        except (JournalUnavailable, StartupError):
            raise
        except Exception:
            log.exception("not sent ahead", job=job.job_id)
        finally:
            sent.ended.set()

    async def _call(self, sent: Sent, body: bytes) -> None:
        job, life, model_id = sent.job, sent.life, str(sent.job.model_id)
        op_no = self._journal.ledger.models[(model_id,)].op_no + 1
        context = plans.Context(self._journal.ledger, life.info, self._alpha, exports=False)
        sent.plan = plans.training(job, body, op_no, context)
        sent.begun = True  # from here on its turn waits for it
        await self._journal.append(plans.started(job, op_no, sent.plan, self._world.now()))
        crash.point("worker.started")
        self._jobs.ahead(job.job_id)  # and it may have its turn already, and be followed
        # The one before it may have no terminal event yet.
        request = life.request(job, op_no, sent.plan.op, acked=max(0, op_no - 2))
        pause = OVERTAKEN_SECONDS
        while sent.reply is None:
            try:
                sent.reply = await life.client.op(request)
            except TrainerRefused as error:
                before, _ = self._turns.get(model_id, (None, None))
                if error.refusal.error != "gap" or before is None or before.job_id == job.job_id:
                    raise
                # The one before it is longer, and has not arrived.
                await trio.sleep(pause)
                pause *= 2
        life.applied[model_id] = max(op_no, life.applied.get(model_id, 0))


def _same(one: Life, other: Life | None) -> bool:
    """Of the server; the link to it may have been found anew."""
    return other is not None and one.incarnation == other.incarnation
