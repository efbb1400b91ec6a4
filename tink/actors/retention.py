"""Retention: deletes what nothing needs any more, so that a worker can run for months on one disk.

What may go is decided in tink/domain/retention.py. Here it goes, each thing in an order that a crash cannot
hurt: first the event that says so, then the bytes; and what a crash has left is found by the next pass,
which looks at what is there and asks who needs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import structlog
import trio

from tink import crash
from tink.actors import placements
from tink.actors.artifacts import ArtifactFolder
from tink.actors.books import KeptBooks
from tink.domain import ids, retention, rows
from tink.domain.events import AdapterDeleted, BodiesPruned, CheckpointDeleted, Entry, Subject
from tink.domain.ledger import Ledger
from tink.domain.retention import Cutoffs, Kept
from tink.errors import JournalUnavailable
from tink.journal import queries
from tink.journal.bodies import Stored
from tink.limits import EXPIRY_SECONDS, RETENTION_SECONDS
from tink.world import World

log = structlog.get_logger()


class Servers(Protocol):
    """The sampling servers, which read adapters from their directories whenever they like."""

    @property
    def directories(self) -> set[str]:
        """Those that they may read again."""

    async def let_go(self) -> None:
        """Takes out what nobody will sample from any more, as far as they let us."""


class Directory(NamedTuple):
    """Of the artifact folder. `size`: bytes."""

    name: str
    size: int


# What goes: a body, a directory; or, while its files are there yet, a checkpoint or an adapter version.
Gone = Stored | Directory | rows.Checkpoint | rows.Adapter


class Retention:
    """An actor. `servers`: None if the trainer samples. `tell` hears of everything that goes."""

    def __init__(
        self,
        journal: KeptBooks,
        folder: ArtifactFolder,
        world: World,
        *,
        kept: Kept,
        servers: Servers | None = None,
        tell: Callable[[Gone], None] = lambda _: None,
    ) -> None:
        self._journal, self._folder, self._world = journal, folder, world
        self._servers = servers
        self._kept = kept
        self._tell = tell
        self._began = world.now(), world.monotonic()
        self._last_requests: dict[str, float] = {}

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_bodies)
            nursery.start_soon(self._keep_artifacts)

    async def once(self) -> bool:
        """All of it, in the order in which one makes room for the next. False if something is left that is
        in use yet."""
        await self.expire_checkpoints()
        await self.delete_adapters()
        complete = await self.remove_directories()
        await self.prune_bodies()
        return complete

    async def _keep_bodies(self) -> None:
        while True:
            try:
                await self.prune_bodies()
            except JournalUnavailable as error:
                # Of a page that cannot be read only those who need it must know. A failed commit stops the
                # worker without our help.
                log.error("bodies not pruned", reason=str(error))
            await trio.sleep(RETENTION_SECONDS)

    async def _keep_artifacts(self) -> None:
        """Everything, now and then; and soon when a checkpoint or a model has come to its end, until what
        it has left is in use no more."""
        ended, passed, left = 0, -math.inf, False
        while True:
            await self.expire_checkpoints()
            last_end = await self._journal.read(queries.last_end)
            due = self._world.monotonic() - passed >= RETENTION_SECONDS
            if due or left or last_end != ended:
                await self.delete_adapters()
                left = not await self.remove_directories() or retention.leaving(self._journal.ledger)
                ended = last_end
            if due:
                passed = self._world.monotonic()
            await trio.sleep(EXPIRY_SECONDS)

    # -- bodies -------------------------------------------------------------------------------------

    async def prune_bodies(self) -> None:
        """Page by page, so that whoever stores a body waits for no more than one of them."""
        cutoffs = self._cutoffs()
        bodies, last = self._journal.bodies, None
        count = size = 0
        while True:
            with bodies.watched() as watch:
                page: list[Stored] = await bodies.oldest(cutoffs.bodies, last)
                if not page:
                    break
                digests = [body.sha256 for body in page]
                jobs = await self._journal.read(
                    partial(queries.jobs_naming, digests=digests, ended_since=cutoffs.results)
                )
                covers = retention.covered(self._journal.ledger)
                stored_at = {body.sha256: body.stored_at for body in page}
                needed = retention.bodies_needed(jobs, stored_at, covers, cutoffs)
                doomed = [b for b in page if b.sha256 not in needed and b.sha256 not in watch]
                if doomed:
                    pruned = BodiesPruned(
                        count=len(doomed),
                        bytes=sum(body.size for body in doomed),
                        submitted_before=cutoffs.requests,
                        finished_before=cutoffs.results,
                    )
                    await self._journal.append((Subject(), pruned))
                    crash.point("worker.bodies-pruned")
                    await bodies.drop([body.sha256 for body in doomed], watch)
                    for body in doomed:
                        self._tell(body)
                    count, size = count + pruned.count, size + pruned.bytes
            last = page[-1]
        if count:
            log.info("bodies pruned", count=count, bytes=size)

    # -- checkpoints and adapters -------------------------------------------------------------------

    async def expire_checkpoints(self) -> None:
        """Deletes those whose time is up."""
        now = self._world.now()
        async with self._journal.naming:
            due = [
                c
                for c in self._journal.ledger.checkpoints.values()
                if c.state == "live" and c.expires_at is not None and c.expires_at <= now
            ]
            await self._journal.append(
                *(
                    (rows.about(c), CheckpointDeleted(checkpoint_id=c.checkpoint_id, reason="expired"))
                    for c in due
                )
            )
        for checkpoint in due:
            self._tell(checkpoint)

    async def delete_adapters(self) -> None:
        """Those that nobody will sample from. Their files go with the other directories."""
        ledger, before = self._journal.ledger, self._cutoffs().adapters
        quiet = retention.quiet_samplers(ledger, before, self._last_requests)
        made = {s: ledger.samplers[(s,)].created_at for s in quiet}
        asked = await self._journal.read(partial(queries.last_requests, samplers=quiet))
        self._last_requests |= made | asked
        async with self._journal.naming:  # no sampler is made meanwhile
            entries: list[Entry] = []
            spare = list(retention.spare_adapters(ledger, before, self._last_requests))
            for adapter, reason in spare:
                entries.append((rows.about(adapter), AdapterDeleted(reason=reason)))
                if self._servers is None:
                    entries.append(placements.entry(adapter, placements.TRAINER, "gone"))
            await self._journal.append(*entries)
        for adapter, reason in spare:
            self._tell(adapter)
            log.info("adapter deleted", adapter=adapter.adapter_id, reason=reason)
        self._last_requests = {s: at for s, at in self._last_requests.items() if at >= before}

    # -- directories --------------------------------------------------------------------------------

    async def remove_directories(self) -> bool:
        """What operations have made and nothing needs: it has ended, or a crash left it behind, or it was
        never journaled. What is needed is asked in an order in which nothing can slip through: the
        directories that are there; then what lives or is open or about to be; then what may be redone, for
        a job that is not open any more has ended by then. False if something is left: it is in use yet."""
        ledger, read = self._journal.ledger, self._journal.read
        if self._servers is not None:
            await self._servers.let_go()
        others = await forgotten(self._folder, ledger)
        models = [*ledger.models.values(), *await read(partial(queries.models, model_ids=others))]
        there = await self._folder.published(models)
        in_use = self._folder.used | (set() if self._servers is None else self._servers.directories)
        kept = retention.directories_kept(ledger)
        sampled = retention.sampled(ledger)
        loads = await read(partial(queries.loads_behind, covers=retention.covered(ledger)))
        kept |= retention.loads_needed(loads, retention.covered(ledger))
        # Of a version that was deleted just when its sampler was asked again.
        kept.update(await read(partial(queries.adapter_directories, adapters=sampled)))
        kept.update(await read(partial(queries.damaged_snapshots, since=self._cutoffs().damaged)))
        for directory in there:
            if directory in kept or directory in in_use:
                continue
            found = Directory(directory, await self._folder.size(directory))
            if await self._folder.remove(directory):
                self._tell(found)
                log.info("directory removed", directory=directory, bytes=found.size)
        # Nothing is written any more where these are.
        ended = {ids.model_directory(model.model_id) for model in models if model.state in retention.ENDED}
        sessions = {model.session_id for model in models if (model.session_id,) not in ledger.sessions}
        await self._folder.remove_empty([*ended, *sessions])
        # The last one that answered may live; one that has not answered yet has written nothing.
        trainers = await read(queries.trainers)
        for name in await self._folder.unfinished(set(trainers) - set(trainers[-1:])):
            self._tell(Directory(name, await self._folder.size(name)))
            await self._folder.clear(name)
        return in_use.isdisjoint(set(there) - kept)

    def _cutoffs(self) -> Cutoffs:
        return Cutoffs.at(self._now(), self._kept)

    def _now(self) -> float:
        """By the wall clock, for times outlast processes; but a clock that is set forward while this one
        runs makes nothing old."""
        wall, monotonic = self._began
        return min(self._world.now(), wall + self._world.monotonic() - monotonic)


async def forgotten(folder: ArtifactFolder, ledger: Ledger) -> list[str]:
    """Models that are not in memory, and have a folder yet; or that are other workers'."""
    return [model for model in await folder.models() if (model,) not in ledger.models]
