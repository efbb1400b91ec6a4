"""The worker without its HTTP side: journal, link, actors and Router, put together and supervised."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from tink.actors.artifacts import ArtifactFolder
from tink.actors.catalogue import Catalogue
from tink.actors.megatron import MegatronActor
from tink.actors.retention import Retention
from tink.actors.router import Router
from tink.actors.sampler import SamplerActor
from tink.actors.snapshots import Snapshots
from tink.actors.supervisor import supervise
from tink.actors.trainer_link import Find, TrainerLink
from tink.journal.journal import Journal
from tink.limits import SAMPLE_SLOTS
from tink.metrics import Metrics
from tink.settings import Settings
from tink.world import World


@asynccontextmanager
async def open_worker(
    journal: Journal, find: Find, settings: Settings, world: World
) -> AsyncIterator[Router]:
    """Runs the actors while the body runs; what is open then is in the journal for the next worker."""
    routes = settings.routes
    training_slots = settings.max_workers if routes.training == "hf" else 1
    # Long polls of every slot, and the link's own calls beside them.
    link = TrainerLink(
        find,
        journal,
        world,
        slots=training_slots + SAMPLE_SLOTS + 2,
        hang_seconds=settings.hang_seconds,
    )
    folder = ArtifactFolder(settings.artifact_root, world)
    metrics = Metrics(journal.ledger, journal.diverged)
    journal.observers.append(metrics.observe)
    catalogue = Catalogue(journal, link, routes, folder, metrics, world)
    router = Router(journal, catalogue, world)
    megatron = MegatronActor(
        journal,
        link,
        router.settle,
        router.release,
        Snapshots(journal, folder, seconds=settings.snapshot_seconds),
        folder,
        world,
        slots=training_slots,
        alpha=settings.lora_alpha,
        max_attempts=settings.max_attempts,
    )
    sampler = SamplerActor(journal, link, router.settle, world, max_attempts=settings.max_attempts)
    retention = Retention(journal, folder, world, hours=settings.retention_hours)
    trains, samples = routes.training is not None, routes.sampling is not None
    router.connect(
        train=megatron.jobs.send if trains else None,
        sample=sampler.jobs.send if samples else None,
        withdraw=sampler.jobs.withdraw,
    )

    async def train() -> None:
        await router.restarted("train", megatron.jobs.clear)
        await megatron.run()

    async def sample() -> None:
        await router.restarted("sample", sampler.jobs.clear)
        await sampler.run()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(router.run)
        if trains or samples:
            nursery.start_soon(supervise, "trainer link", link.run, world)
        if trains:
            nursery.start_soon(supervise, "training lane", train, world)
        if samples:
            nursery.start_soon(supervise, "sampler", sample, world)
        nursery.start_soon(supervise, "retention", retention.run, world)
        yield router
        nursery.cancel_scope.cancel()
