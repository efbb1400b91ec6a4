"""Snapshots of models: taken when a redo would get long, used when a trainer has lost its state.

A snapshot is published by the trainer (temporary directory, fsync, rename, a manifest with sha256) and
only then written into the journal; one that the journal does not know is never used. SNAPSHOTS_KEPT are
kept: one that cannot be used falls back to the one before it, and that to the first operation. It is given
up once the model is up to date without it, and not before: it may be the whole folder that is not there.
"""

from __future__ import annotations

from functools import partial

import structlog
import trio

from tink import crash
from tink.actors.artifacts import ArtifactFolder
from tink.actors.books import Books
from tink.actors.link import Life
from tink.backends.trainer import TrainerGone, TrainerRefused
from tink.domain import ids, rows
from tink.domain.events import SnapshotDropped, SnapshotTaken, Subject
from tink.domain.requests import MUTATING
from tink.errors import BackendError
from tink.journal import queries
from tink.limits import SNAPSHOTS_KEPT
from tink.wire.tink_train import RestoreRequest, SnapshotRequest

log = structlog.get_logger()


class Snapshots:
    """`seconds`: how long a redo may get, as the operations ran the first time."""

    def __init__(self, journal: Books, folder: ArtifactFolder, *, seconds: float) -> None:
        self._journal, self._folder = journal, folder
        self._limit_ms = seconds * 1000
        self._redo_ms: dict[str, float] = {}

    def is_due(self, job: rows.Job) -> bool:
        """Whether one is to be taken when `job`, which runs, is done: then nothing may run behind it. Also
        as long as that is not known."""
        model_id = str(job.model_id)
        if job.op not in MUTATING:
            return False
        return model_id not in self._redo_ms or self._redo_ms[model_id] >= self._limit(job)

    async def consider(self, life: Life | None, job: rows.Job, *, between: bool) -> None:
        """Called after `job` is done: takes a snapshot if it is time, and if this is `between` two of the
        model's operations: when the next one has begun already, it waits for that. After an optimizer
        step there are no gradients to write, so it waits for one, within reason. What goes wrong with
        it is logged, and tried again after the next operation."""
        model_id = str(job.model_id)
        if model_id not in self._redo_ms:
            newest = next(iter(self._live(model_id)), None)
            behind = partial(queries.redo_ms, model_id=model_id, after=newest.op_no if newest else 0)
            self._redo_ms[model_id] = await self._journal.read(behind)
        else:
            self._redo_ms[model_id] += job.run_ms or 0.0
        if life is None or not between or self._redo_ms[model_id] < self._limit(job):
            return
        try:
            await self._take(life, job)
        except BackendError as error:
            log.warning("no snapshot", model=model_id, reason=str(error))
        else:
            self._redo_ms[model_id] = 0.0

    def _limit(self, job: rows.Job) -> float:
        return self._limit_ms if job.op == "optim_step" else 2 * self._limit_ms

    def forget(self, model_id: str) -> None:
        """The model is trained no more."""
        self._redo_ms.pop(model_id, None)

    async def restore(self, life: Life, model_id: str, applied: int) -> tuple[int, list[rows.Snapshot]]:
        """Gives a trainer that is behind the newest snapshot it can use: the op_no where it is then, and
        the newer ones, that it could not use. Raises TrainerGone."""
        unusable: list[rows.Snapshot] = []
        for snapshot in self._live(model_id):
            if snapshot.op_no <= applied:
                break
            request = RestoreRequest(life.incarnation, life.lease, model_id, snapshot.directory)
            try:
                restored = (await life.client.restore(request)).applied
            except TrainerRefused as error:
                if error.refusal.error == "not_behind":  # restored by a call whose answer was lost
                    life.applied[model_id] = applied = error.refusal.applied or applied
                    break
                if error.refusal.error != "failed":
                    raise
                log.error("snapshot damaged", model=model_id, op_no=snapshot.op_no, reason=str(error))
                unusable.append(snapshot)
                continue
            if restored != snapshot.op_no:
                raise TrainerGone(f"the trainer restored op {restored}, not {snapshot.op_no}")
            life.applied[model_id] = applied = restored
            log.info("restored", model=model_id, op_no=applied)
            crash.point("worker.restored")
            break
        return applied, unusable

    async def give_up(self, unusable: list[rows.Snapshot]) -> None:
        """The model is up to date without them."""
        for snapshot in unusable:
            await self._drop(snapshot, "damaged")

    async def _take(self, life: Life, job: rows.Job) -> None:
        assert job.op_no is not None
        model_id = str(job.model_id)
        directory = ids.directory(model_id, job.op_no, "snapshot")
        request = SnapshotRequest(life.incarnation, life.lease, model_id, directory)
        with self._folder.use(directory):
            reply = await life.client.snapshot(request)
            if reply.applied != job.op_no:
                raise BackendError(f"the trainer took a snapshot of op {reply.applied}, not {job.op_no}")
            crash.point("worker.snapshot-published")
            taken = SnapshotTaken(
                snapshot_id=f"{model_id}#{reply.applied}",
                op_no=reply.applied,
                directory=directory,
                size_bytes=sum(file.size for file in reply.files),
            )
            await self._journal.append((Subject(tenant=job.tenant, model_id=model_id), taken))
        log.info("snapshot", model=model_id, op_no=reply.applied, bytes=taken.size_bytes)
        crash.point("worker.snapshot-journaled")
        for old in self._live(model_id)[SNAPSHOTS_KEPT:]:
            await self._drop(old, "pruned")

    async def _drop(self, snapshot: rows.Snapshot, reason: str) -> None:
        dropped = SnapshotDropped(
            snapshot_id=snapshot.snapshot_id, reason="pruned" if reason == "pruned" else "damaged"
        )
        # Shielded: whoever comes next must not drop it once more.
        with trio.CancelScope(shield=True):
            await self._journal.append((rows.about(snapshot), dropped))
        crash.point("worker.snapshot-dropped")
        if reason == "pruned":  # a damaged one is left, for a while, for whoever wants to know how
            await self._folder.remove(snapshot.directory)

    def _live(self, model_id: str) -> list[rows.Snapshot]:
        """Newest first."""
        found = [
            snapshot
            for snapshot in self._journal.ledger.snapshots.values()
            if snapshot.model_id == model_id
        ]
        return sorted(found, key=lambda snapshot: snapshot.op_no, reverse=True)
