"""The worker without its HTTP side: journal, backends, actors and Router, put together and supervised."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from tink.actors.artifacts import ArtifactFolder
from tink.actors.backends import Backends
from tink.actors.beginnings import Beginnings
from tink.actors.catalogue import Catalogue
from tink.actors.jobs import Jobs
from tink.actors.megatron import MegatronActor
from tink.actors.placements import TRAINER, Placements
from tink.actors.pool import VLLMPool
from tink.actors.retention import Retention
from tink.actors.router import Router
from tink.actors.sampler import SamplerActor
from tink.actors.snapshots import Snapshots
from tink.actors.supervisor import supervise
from tink.actors.trainer_link import Find, TrainerLink
from tink.actors.trainer_samples import TrainerSamples
from tink.journal.journal import Journal
from tink.limits import (
    SAMPLE_SLOTS,
    TRAINER_OWN_SLOTS,
)
from tink.metrics import Metrics
from tink.settings import Settings
from tink.world import World


@asynccontextmanager
async def open_worker(
    journal: Journal, find: Find, settings: Settings, world: World
) -> AsyncIterator[Router]:
    """Runs the actors while the body runs; what is open then is in the journal for the next worker."""
    routes = settings.routes
    link = TrainerLink(
        find,
        journal,
        world,
        slots=2 * settings.training_slots + SAMPLE_SLOTS + TRAINER_OWN_SLOTS,
        hang_seconds=settings.hang_seconds,
    )
    folder = ArtifactFolder(settings.artifact_root, world)
    pool = None
    if routes.sampling == "vllm":
        pool = VLLMPool(
            settings.vllm_urls,
            journal,
            folder,
            await Placements.follow(journal, settings.vllm_urls),
            world,
            token=settings.vllm_api_key,
            wait_seconds=settings.vllm_wait_seconds,
            max_attempts=settings.max_attempts,
            trained=lambda: link.known if routes.trainer else None,
        )
    else:
        await Placements.follow(journal, [TRAINER])
    metrics = Metrics(journal.ledger, journal.diverged)
    journal.present.observers.append(metrics.observe)
    backends = Backends(link if routes.trainer else None, pool)
    catalogue = Catalogue(journal, backends, routes, folder, metrics, world)
    by_trainer = TrainerSamples(journal, link, world, max_attempts=settings.max_attempts)
    sampling_backend = by_trainer if pool is None else pool
    training, sampling = Jobs(settings.training_slots), Jobs(sampling_backend.slots)
    beginnings = Beginnings(journal, link, training)
    router = Router(journal, catalogue, training, sampling, beginnings, world)
    megatron = MegatronActor(
        training,
        journal,
        link,
        router.settle,
        router.release,
        beginnings,
        Snapshots(journal, folder, seconds=settings.snapshot_seconds),
        folder,
        world,
        alpha=settings.lora_alpha,
        max_attempts=settings.max_attempts,
        place=None if pool is None else pool.place,
    )
    sampler = SamplerActor(
        sampling,
        journal,
        sampling_backend,
        router.settle,
        scorer=by_trainer if pool is not None and routes.trainer else None,
    )
    retention = Retention(
        journal,
        folder,
        world,
        kept=settings.kept,
        servers=pool,
    )

    async def train() -> None:
        await router.restarted(training)
        await megatron.run()

    async def sample() -> None:
        await router.restarted(sampling)
        await sampler.run()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(router.run)
        if routes.trainer:
            nursery.start_soon(supervise, "trainer link", link.run, world)
        if pool is not None:
            nursery.start_soon(pool.run)
        if routes.training is not None:
            nursery.start_soon(supervise, "training lane", train, world)
        if routes.sampling is not None:
            nursery.start_soon(supervise, "sampler", sample, world)
        nursery.start_soon(supervise, "retention", retention.run, world)
        yield router
        nursery.cancel_scope.cancel()
