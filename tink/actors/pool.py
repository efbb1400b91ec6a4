"""The vLLM servers together: a sample goes to the one with least to do, and to another if that fails."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager

import structlog
import trio

from tink.actors.artifacts import ArtifactFolder
from tink.actors.backoff import Backoff
from tink.actors.placements import Placements
from tink.actors.replica_adapters import LoadFailures
from tink.actors.supervisor import supervise
from tink.actors.vllm import EXPOSURES, Exposure, VLLMActor
from tink.backends import same_model
from tink.backends.replica import (
    Aborted,
    AdapterMissing,
    Probe,
    ReplicaGone,
    ReplicaRefused,
    Served,
    Unsent,
)
from tink.domain import adapters, rows
from tink.domain.events import JobStarted, TrainerStarted
from tink.domain.routing import NO_VLLM
from tink.errors import BackendError
from tink.journal.journal import Journal
from tink.limits import (
    ADAPTER_SECONDS,
    AFFINITIES,
    AFFINITY_SLACK,
    AFFINITY_TOKENS,
    REPLICA_SLOTS,
    SAMPLE_MOVES,
)
from tink.wire.tink_train import SampleReply, SampleRequest
from tink.world import World

log = structlog.get_logger()


class _Patience:
    """What is left of the time that a job waits while no server is there; all of it once one was."""

    def __init__(self, seconds: float, world: World) -> None:
        self._seconds, self._world = seconds, world
        self._left = seconds

    def renew(self) -> None:
        self._left = self._seconds

    async def wait(self, event: trio.Event) -> bool:
        """For the event; False once the time is up."""
        began = self._world.monotonic()
        with trio.move_on_after(max(self._left, 0.0)):
            await event.wait()
        self._left -= self._world.monotonic() - began
        return event.is_set()


class VLLMPool:
    """A SamplingBackend. `wait_seconds`: how long a job waits for a server to come, when none is there.
    `trained`: what the trainer serves, if one is used and known."""

    def __init__(
        self,
        urls: Sequence[str],
        journal: Journal,
        folder: ArtifactFolder,
        placements: Placements,
        world: World,
        *,
        wait_seconds: float,
        max_attempts: int,
        trained: Callable[[], TrainerStarted | None],
        token: str = "",
    ) -> None:
        self._journal, self._world = journal, world
        self._wait_seconds, self._max_attempts = wait_seconds, max_attempts
        self._change = trio.Event()
        # Samples for which no server has room, by how they are out and whether they need an adapter.
        self._lines = {
            (exposure, adapted): trio.lowlevel.ParkingLot()
            for exposure in EXPOSURES
            for adapted in (False, True)
        }
        # Which server had a prompt that began like this one: its cache may have the beginning.
        self._affinities: OrderedDict[bytes, str] = OrderedDict()
        self.placements, self.trained = placements, trained
        self.failures = LoadFailures(world, most=max_attempts)
        self.replicas = [VLLMActor(url, journal, folder, world, self, token=token) for url in urls]

    @property
    def slots(self) -> int:
        return REPLICA_SLOTS * len(self.replicas)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for replica in self.replicas:
                nursery.start_soon(supervise, f"vllm {replica.url}", replica.run, self._world)

    async def served(self) -> Served:
        """What the servers serve, as far as is known. Waits until one has answered; raises BackendError if
        none does."""
        await trio.lowlevel.checkpoint()
        patience = _Patience(self._wait_seconds, self._world)
        while True:
            for replica in self.replicas:
                if replica.served is not None:
                    return replica.served
            if not await patience.wait(self._change):
                raise self._unreachable()

    def changed(self) -> None:
        """A server begins or ceases to take requests."""
        change, self._change = self._change, trio.Event()
        change.set()
        for line in self._lines.values():
            line.unpark_all()

    def compare(self, newcomer: VLLMActor, served: Served, probe: Probe | None) -> None:
        for replica in self.replicas:
            if replica is newcomer or not replica.there or replica.served is None:
                continue
            same_model.check_alike(served, probe, replica.served, replica.probe, replica.url)

    # -- adapters -------------------------------------------------------------------------------------

    async def place(self, adapter: rows.Adapter) -> list[str]:
        """Registers a version on every server that is there: their URLs. Waits for one to come. Raises
        BackendError if none does, or one will not have it, or too many have failed over it."""
        name = adapters.served_name(self._journal.home_id, adapter)
        patience, backoff = _Patience(self._wait_seconds, self._world), Backoff()
        tries = 0
        while tries < SAMPLE_MOVES:
            change = self._change
            placed: list[str] = []
            if ready := self._ready(adapter):
                patience.renew()
            # One that has killed a server is not given to all of them at once.
            together = [[replica] for replica in ready] if self.failures.doubtful(name) else [ready]
            for some in together:
                having = await self._place_on(some, adapter)
                placed += having
                if not having:
                    break
            if placed:
                return placed
            if ready:
                tries += 1
                await backoff.pause()
            elif self._is_there(adapter):
                await change.wait()
            elif not await patience.wait(change):
                raise self._unreachable()
        raise BackendError(
            f"no vLLM server has taken the adapter {name!r} in {tries} tries: {self._tried()}"
        )

    async def _place_on(self, replicas: Sequence[VLLMActor], adapter: rows.Adapter) -> list[str]:
        placed: list[str] = []
        refused: list[BackendError] = []

        async def place(replica: VLLMActor) -> None:
            try:
                if await replica.place(adapter):
                    placed.append(replica.url)
            except BackendError as error:
                refused.append(error)

        async with trio.open_nursery() as nursery:
            for replica in replicas:
                nursery.start_soon(place, replica)
        if refused:
            raise refused[0]
        return placed

    async def let_go(self) -> None:
        """Returns once no server that is there has a version that nobody will sample from any more; or
        it does not do as it is told."""
        with trio.move_on_after(ADAPTER_SECONDS):
            async with trio.open_nursery() as nursery:
                for replica in self.replicas:
                    nursery.start_soon(replica.tidy)

    @property
    def directories(self) -> set[str]:
        """Those of the adapters that servers have, and may read again."""
        return set().union(*(replica.directories for replica in self.replicas))

    # -- samples --------------------------------------------------------------------------------------

    async def sample(
        self, job: rows.Job, request: SampleRequest, adapter: rows.Adapter | None
    ) -> SampleReply:
        deaths, backoff = 0, Backoff()
        patience = _Patience(self._wait_seconds, self._world)
        for _ in range(SAMPLE_MOVES):
            try:
                exposure = self._exposure(deaths)
                async with self._server(request, adapter, exposure, patience) as replica:
                    started = JobStarted(
                        attempt=job.attempts + 1,
                        backend=replica.url,
                        queue_ms=job.queued_ms(self._world.now()),
                    )
                    await self._journal.append((rows.about(job), started))
                    began = self._world.monotonic()
                    sampled = await replica.sample(request, adapter)
            except (ReplicaGone, AdapterMissing) as error:
                deaths += not isinstance(error, Aborted | Unsent | AdapterMissing)
                reason = str(error)
                log.warning("sample moved", job=job.job_id, url=job.backend, reason=reason)
                if deaths >= self._max_attempts:
                    raise BackendError(
                        f"the sampling server failed {deaths} times while it ran this job, at last: "
                        f"{error}; given up after TINK_MAX_ATTEMPTS={self._max_attempts}"
                    ) from error
                await backoff.pause()
                continue
            return SampleReply(
                "done",
                request.sample_id,
                sampled.body,
                sampled.tokens_in,
                sampled.tokens_out,
                run_ms=(self._world.monotonic() - began) * 1000,
            )
        raise BackendError(
            f"no vLLM server has kept this sample in {SAMPLE_MOVES} tries, at last: {reason}"
        )

    def _exposure(self, deaths: int) -> Exposure:
        if not deaths:
            return "free"
        return "alone" if deaths >= self._max_attempts - 1 else "suspect"

    @asynccontextmanager
    async def _server(
        self,
        request: SampleRequest,
        adapter: rows.Adapter | None,
        exposure: Exposure,
        patience: _Patience,
    ) -> AsyncIterator[VLLMActor]:
        """A server with room for it, which is kept for it: the one with least to do, or one that has seen
        the beginning of the prompt if it has hardly more. Raises BackendError if none comes."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not (free := [one for one in self._ready(adapter) if one.has_room(exposure)]):
            if self._is_there(adapter):
                await self._lines[exposure, adapter is not None].park()
            elif not await patience.wait(self._change):
                raise self._unreachable()
        patience.renew()
        replica = self._best(free, request)
        try:
            with replica.slot(request, exposure):
                yield replica
        finally:
            for line in self._lines.values():
                line.unpark()

    def _best(self, free: list[VLLMActor], request: SampleRequest) -> VLLMActor:
        keys = list(_beginnings(request))
        best = least = min(free, key=lambda replica: (replica.outstanding, replica.waiting))
        # The longest beginning that was seen counts: many prompts have the same first words.
        known = next((self._affinities[key] for key in reversed(keys) if key in self._affinities), None)
        for replica in free:
            if replica.url == known and replica.outstanding <= least.outstanding + AFFINITY_SLACK:
                best = replica
        for key in keys:
            self._affinities[key] = best.url
            self._affinities.move_to_end(key)
        while len(self._affinities) > AFFINITIES:
            self._affinities.popitem(last=False)
        return best

    def _ready(self, adapter: rows.Adapter | None) -> list[VLLMActor]:
        """Those that take requests for it. Raises ReplicaRefused if none takes adapters."""
        if adapter is not None and all(replica.there and replica.lacks for replica in self.replicas):
            raise ReplicaRefused(self.replicas[0].lacks)
        return [replica for replica in self.replicas if replica.up and not (adapter and replica.lacks)]

    def _is_there(self, adapter: rows.Adapter | None) -> bool:
        """Whether one will take it, or is looked at for whether it does."""
        return any(replica.there and not (adapter and replica.lacks) for replica in self.replicas)

    def _unreachable(self) -> BackendError:
        return BackendError(
            f"{NO_VLLM} for {self._wait_seconds:g} s (TINK_VLLM_WAIT_SECONDS): "
            f"{self._tried()}; start it (tink vllm), or set VLLM_BASE_URL to where it is"
        )

    def _tried(self) -> str:
        return "; ".join(f"{replica.url}: {replica.reason}" for replica in self.replicas)


def _beginnings(request: SampleRequest) -> Iterator[bytes]:
    """Of what is in a server's prefix cache: adapter and first tokens, the shortest first. A prompt that
    goes on from another one has its beginnings, and may have more."""
    whole = hashlib.sha256(repr(request.adapter).encode())
    done, length = 0, AFFINITY_TOKENS
    while done == 0 or length <= len(request.prompt):
        whole.update(repr(request.prompt[done:length]).encode())
        yield whole.copy().digest()[:16]
        done, length = length, 2 * length
