"""One worker of the record, put together of the real actors over what stands for the rest."""

from __future__ import annotations

import math
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from tink.actors.artifacts import ArtifactFolder
from tink.actors.beginnings import Beginnings
from tink.actors.catalogue import Catalogue
from tink.actors.jobs import Jobs
from tink.actors.megatron import MegatronActor
from tink.actors.router import Router
from tink.actors.sampler import SamplerActor
from tink.domain.events import TrainerStarted
from tink.domain.routing import Routes
from tink.errors import JournalUnavailable
from tink.metrics import Metrics
from tink.replay.decisions.history import History
from tink.replay.decisions.journal import RecordedJournal
from tink.replay.decisions.servers import (
    Calls,
    RecordedBackends,
    RecordedLink,
    RecordedSamples,
    RecordedSnapshots,
    Sent,
)
from tink.replay.decisions.world import RecordedWorld


class RecordedJobs(Jobs):
    """When a job that waits begins, the record says."""

    def __init__(self) -> None:
        super().__init__(slots=sys.maxsize)
        self.begins = False

    @property
    def room(self) -> int:
        """As the record has it: what is accepted now begins with that, or waits."""
        return self.slots if self.begins else 0

    def coming(self) -> list[str]:
        """Behind a job of its own model one may go ahead; before those of others one just begins."""
        return list(self._expected)

    async def run(self, run_one: Callable[[str], Awaitable[None]]) -> None:
        async with trio.open_nursery() as self._nursery:
            self._begin = run_one
            await trio.sleep_forever()

    def waiting(self) -> list[str]:
        return list(self._waiting)

    def runs(self, job_id: str) -> bool:
        return job_id in self._running

    def begin(self, job_id: str) -> bool:
        """False: the Router has not sent it."""
        if not self.withdraw(job_id):
            return False
        self._running.add(job_id)
        self._nursery.start_soon(self._run_one, self._begin, job_id)
        return True


class RecordedWorker:
    """Made by `open_worker`."""

    def __init__(
        self, journal: RecordedJournal, history: History, world: RecordedWorld, sent: Sent | None
    ) -> None:
        settings = history.settings[journal.incarnation]
        self.vllm = settings.vllm
        self.calls = Calls(sent)
        self.link = RecordedLink(self.calls, history.max_rank)
        self.training, self.sampling = RecordedJobs(), RecordedJobs()
        # Nothing is read or written there.
        folder = ArtifactFolder(Path(), world)
        catalogue = Catalogue(
            journal,
            RecordedBackends(self.link, history.base_model),
            # What was journaled was served.
            Routes(sampling="vllm" if self.vllm else "megatron", training="megatron"),
            folder,
            Metrics(journal.ledger, 0),
            world,
        )
        beginnings = Beginnings(journal, self.link, self.training)
        self.router = Router(journal, catalogue, self.training, self.sampling, beginnings, world)
        self._megatron = MegatronActor(
            self.training,
            journal,
            self.link,
            self.router.settle,
            self.router.release,
            beginnings,
            RecordedSnapshots(journal, folder, seconds=math.inf),
            folder,
            world,
            alpha=settings.alpha,
            max_attempts=sys.maxsize,  # giving up is in the record, too
            place=self.calls.place if self.vllm else None,
        )
        samples = RecordedSamples(self.calls, journal)
        self._sampler = SamplerActor(self.sampling, journal, samples, self.router.settle)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.router.run)
            nursery.start_soon(self._train)
            nursery.start_soon(self._sample)

    async def _train(self) -> None:
        await self.router.restarted(self.training)
        await self._megatron.run()

    async def _sample(self) -> None:
        await self.router.restarted(self.sampling)
        await self._sampler.run()


@asynccontextmanager
async def open_worker(
    journal: RecordedJournal,
    history: History,
    world: RecordedWorld,
    served: TrainerStarted | None,
    sent: Sent | None,
) -> AsyncIterator[RecordedWorker]:
    """Runs the actors while the body runs. `served`: the trainer, if the record has named one."""
    worker = RecordedWorker(journal, history, world, sent)
    worker.link.serve(served)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.run)
            try:
                yield worker
            finally:
                journal.end_worker()
                nursery.cancel_scope.cancel()
    except* JournalUnavailable:
        pass  # what it held was not committed
