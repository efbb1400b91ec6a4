"""The vLLM servers together: a sample goes to the one with least to do, and to another if that fails."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import structlog
import trio

from tink.actors import plans
from tink.actors.backoff import Backoff
from tink.actors.supervisor import supervise
from tink.actors.vllm import VLLMActor
from tink.backends.replica import Aborted, AdapterMissing, ReplicaGone, Served, Unsent
from tink.domain import rows
from tink.domain.events import JobStarted
from tink.errors import BackendError
from tink.journal.journal import Journal
from tink.limits import AFFINITIES, AFFINITY_SLACK, AFFINITY_TOKENS, REPLICA_SLOTS, SAMPLE_MOVES
from tink.trainer.protocol import SampleReply, SampleRequest
from tink.world import World

log = structlog.get_logger()


class VLLMPool:
    """A SamplingBackend. `wait_seconds`: how long a job waits for a server to come, when none is there."""

    def __init__(
        self,
        urls: Sequence[str],
        journal: Journal,
        folder: Path,
        world: World,
        *,
        wait_seconds: float,
        max_attempts: int,
        token: str = "",
    ) -> None:
        self._journal, self._world = journal, world
        self._wait_seconds, self._max_attempts = wait_seconds, max_attempts
        self._changes = trio.Event()
        # Which server had a prompt that began like this one: its cache may have the beginning.
        self._affinities: OrderedDict[bytes, str] = OrderedDict()
        self.replicas = [VLLMActor(url, journal, folder, world, self._changed, token=token) for url in urls]

    @property
    def slots(self) -> int:
        return REPLICA_SLOTS * len(self.replicas)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for replica in self.replicas:
                nursery.start_soon(supervise, f"vllm {replica.url}", replica.run, self._world)

    async def served(self) -> Served:
        """What the servers serve, as far as is known. Waits until one has answered."""
        await trio.lowlevel.checkpoint()
        while True:
            for replica in self.replicas:
                if replica.served is not None:
                    return replica.served
            await self._changes.wait()

    def _changed(self) -> None:
        self._changes.set()
        self._changes = trio.Event()

    # -- adapters -----------------------------------------------------------------------------------

    async def place(self, adapter: rows.Adapter) -> list[str]:
        """Registers a version on every server that is there: their URLs. Waits for one to come. Raises
        BackendError if none does, or one will not have it."""
        placed: list[str] = []
        refused: list[BackendError] = []

        backoff = Backoff()

        async def place_on(replica: VLLMActor) -> None:
            try:
                if await replica.place(adapter):
                    placed.append(replica.url)
            except BackendError as error:
                refused.append(error)

        with trio.move_on_after(self._wait_seconds):
            while not placed and not refused:
                changes = self._changes
                ready = [replica for replica in self.replicas if replica.up]
                async with trio.open_nursery() as nursery:
                    for replica in ready:
                        nursery.start_soon(place_on, replica)
                if ready and not placed and not refused:
                    await backoff.pause()
                elif not ready:
                    await changes.wait()
        if refused:
            raise refused[0]
        if not placed:
            raise self._unreachable()
        return placed

    async def remove(self, adapter: rows.Adapter) -> None:
        for replica in self.replicas:
            await replica.remove(adapter)

    # -- samples ------------------------------------------------------------------------------------

    async def sample(
        self, job: rows.Job, request: SampleRequest, adapter: rows.Adapter | None
    ) -> SampleReply:
        deaths, backoff = 0, Backoff()
        for _ in range(SAMPLE_MOVES):
            replica = await self._choose(request)
            started = JobStarted(attempt=job.attempts + 1, backend=replica.url)
            await self._journal.append((plans.subject(job), started))
            began = self._world.monotonic()
            try:
                sampled = await replica.sample(request, adapter, suspect=deaths > 0)
            except (ReplicaGone, AdapterMissing) as error:
                deaths += not isinstance(error, Aborted | Unsent | AdapterMissing)
                log.warning("sample moved", job=job.job_id, url=replica.url, reason=str(error))
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
        raise BackendError(f"no vLLM server has kept this sample in {SAMPLE_MOVES} tries")

    async def _choose(self, request: SampleRequest) -> VLLMActor:
        """The server with least to do, or one that has seen the beginning of the prompt if it has hardly
        more. Waits for one to come; raises BackendError if none does."""
        with trio.move_on_after(self._wait_seconds):
            while True:
                ready = [replica for replica in self.replicas if replica.up]
                if ready:
                    return self._best(ready, request)
                await self._changes.wait()
        raise self._unreachable()

    def _best(self, ready: list[VLLMActor], request: SampleRequest) -> VLLMActor:
        key = _beginning(request)
        least = min(ready, key=lambda replica: (replica.outstanding, replica.waiting))
        known = self._affinities.get(key)
        for replica in ready:
            if replica.url == known and replica.outstanding <= least.outstanding + AFFINITY_SLACK:
                least = replica
        self._affinities[key] = least.url
        self._affinities.move_to_end(key)
        while len(self._affinities) > AFFINITIES:
            self._affinities.popitem(last=False)
        return least

    def _unreachable(self) -> BackendError:
        tried = "; ".join(f"{replica.url}: {replica.reason}" for replica in self.replicas)
        return BackendError(
            f"vLLM server can't be reached for {self._wait_seconds:g} s (TINK_VLLM_WAIT_SECONDS): {tried}; "
            "start it (tink vllm), or set VLLM_BASE_URL to where it is"
        )


def _beginning(request: SampleRequest) -> bytes:
    """Of what is in a server's prefix cache: adapter and first tokens."""
    first = repr((request.adapter, request.prompt[:AFFINITY_TOKENS]))
    return hashlib.sha256(first.encode()).digest()[:16]
