"""A training server that has lost a model's operations gets them again, from a snapshot or from the start,
in order and exactly as they were; and what they give is compared with what they gave."""

from __future__ import annotations

from functools import partial

import structlog

from tink import crash
from tink.actors.books import JobBooks
from tink.actors.link import Life
from tink.actors.snapshots import Snapshots
from tink.backends.trainer import TrainerRefused
from tink.domain import plans, rows
from tink.domain.events import Diverged, Redone, Subject
from tink.domain.requests import MUTATING
from tink.errors import BackendError
from tink.journal import queries
from tink.world import World

log = structlog.get_logger()


class Redo:
    def __init__(self, journal: JobBooks, snapshots: Snapshots, world: World) -> None:
        self._journal, self._snapshots, self._world = journal, snapshots, world

    async def bring_up(self, life: Life, model_id: str, upto: int) -> None:
        """Applies again what the server lacks of the model's operations up to `upto`. Raises BackendError
        if that cannot be done, TrainerGone or TrainerRefused if the server does not go on. Cancelled, what
        was applied stays applied."""
        applied = life.applied.get(model_id, 0)
        if applied >= upto:
            return
        began = self._world.monotonic()
        applied, unusable = await self._snapshots.restore(life, model_id, applied)
        log.info("redo", model=model_id, first=applied + 1, last=upto)
        lacking = partial(queries.ops, model_id=model_id, after=applied, upto=upto)
        for job in await self._journal.read(lacking):
            assert job.op_no is not None
            if job.op_no > life.applied.get(model_id, 0):
                await self._apply(life, job, job.op_no)
        await self._snapshots.give_up(unusable)
        run_ms = (self._world.monotonic() - began) * 1000
        who = Subject(tenant=self._journal.ledger.models[(model_id,)].tenant, model_id=model_id)
        await self._journal.append((who, Redone(first=applied + 1, last=upto, run_ms=run_ms)))

    async def _apply(self, life: Life, job: rows.Job, op_no: int) -> None:
        model_id = str(job.model_id)
        mutates = job.state == "done" and job.op in MUTATING
        try:
            body = await self._journal.request(job) if mutates else b""
        except BackendError as error:
            raise _cannot_be_redone(job, str(error)) from error
        op = plans.again(job, body, self._journal.ledger)
        try:
            reply = await life.client.op(life.request(job, op_no, op, acked=op_no - 1))
        except TrainerRefused as error:
            if error.refusal.error != "result_gone":
                raise
            # It was applied while this life's view of the server was being taken.
            life.applied[model_id] = error.refusal.applied or op_no
            return
        if mutates and reply.failure is not None and job.op in ("create_model", "load_weights"):
            # What comes after it would be applied to something else.
            raise _cannot_be_redone(job, reply.failure.message)
        life.applied[model_id] = op_no
        # If it differs the run goes on, and the journal says so.
        detail = plans.difference(job, reply) if mutates else None
        if detail is not None:
            log.error("diverged", job=job.job_id, detail=detail)
            await self._journal.append((rows.about(job), Diverged(op_no=op_no, detail=detail)))
        crash.point("worker.redone")


def _cannot_be_redone(job: rows.Job, reason: str) -> BackendError:
    return BackendError(
        f"the training server has lost the model {job.model_id}, and operation {job.op_no} cannot be "
        f"applied again: {reason}; go on from a checkpoint, in a new model"
    )
