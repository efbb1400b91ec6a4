"""What comes next at the training server is there before its turn: while operations run, the bodies of the
jobs behind them are read from the journal and given to the server, so that an operation need only name its
own.

A best effort, and no more: what is sent, when, and in which order is decided without it, and an operation
whose body did not arrive, or was lost there, carries it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import structlog
import trio

from tink.actors.books import JobBooks
from tink.actors.jobs import Jobs
from tink.actors.link import Link
from tink.domain import rows
from tink.domain.requests import DATA_OPS
from tink.errors import BackendError, UserError
from tink.limits import AHEAD_BYTES, AHEAD_JOBS_PER_SLOT
from tink.wire.tink_train import BODIES
from tink.world import World

log = structlog.get_logger()


class Shipped(NamedTuple):
    """A body, its sha256, and the life of the server that has been given it."""

    body: bytes
    digest: str
    incarnation: str


class Ahead:
    """`run` ships the bodies of the jobs that are coming, one at a time and each once; `take` is what a job
    that begins finds done for it."""

    def __init__(self, journal: JobBooks, link: Link, jobs: Jobs, world: World) -> None:
        self._journal, self._link, self._jobs, self._world = journal, link, jobs, world
        # By job; None: it is on its way, or could not be shipped.
        self._shipped: dict[str, Shipped | None] = {}
        self._calls = 0
        self._time = trio.Event()
        self._on_its_way: str | None = None
        self._way = trio.CancelScope()

    def take(self, job_id: str) -> Shipped | None:
        """What has arrived for this job. The operation does not wait for a body that is still on its way:
        that one is given up."""
        if job_id == self._on_its_way:
            self._way.cancel()
        return self._shipped.pop(job_id, None)

    @contextmanager
    def time(self) -> Iterator[None]:
        """While the body runs, the server has an operation: there is time for those behind it. Between two
        of them there is none."""
        self._calls += 1
        self._time.set()
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self._time = trio.Event()

    async def run(self) -> None:
        """For ever."""
        self._shipped.clear()
        while True:
            await self._time.wait()
            job = self._next()
            if job is None:
                await self._jobs.changed()
            else:
                await self._ship(job)

    def _next(self) -> rows.Job | None:
        held = sum(len(shipped.body) for shipped in self._shipped.values() if shipped is not None)
        if held >= AHEAD_BYTES:
            return None
        open_jobs = self._journal.ledger.jobs
        jobs = (open_jobs.get((job_id,)) for job_id in self._jobs.coming())
        with_body = [job for job in jobs if job is not None and job.op in DATA_OPS]
        near = with_body[: AHEAD_JOBS_PER_SLOT * self._jobs.slots]
        return next((job for job in near if job.job_id not in self._shipped), None)

    async def _ship(self, job: rows.Job) -> None:
        self._shipped[job.job_id], self._on_its_way = None, job.job_id
        with trio.CancelScope() as self._way:
            try:
                life = await self._link.life()
                if BODIES not in life.info.capabilities:
                    return
                body = await self._journal.request(job)
                digest = await self._digest(job, body)
                await life.client.keep(digest, body)
            except (BackendError, UserError) as error:
                log.info("body not sent ahead", job=job.job_id, reason=str(error))
                return
            finally:
                self._on_its_way = None
            if job.job_id in self._shipped:
                self._shipped[job.job_id] = Shipped(body, digest, life.incarnation)

    async def _digest(self, job: rows.Job, body: bytes) -> str:
        if job.codec == "identity":
            assert job.body_sha256 is not None, "a data op has a body"
            return job.body_sha256
        # The journal has it as it came, compressed.
        return await self._world.run_sync(lambda: hashlib.sha256(body).hexdigest())
