"""One vLLM server: whether it is there, which adapters it has, and the samples that it runs.

A server that comes (back) gets its adapters first and requests after that; one that fails, drains, hangs or
has lost its adapters gets none, and what it was running is moved. vLLM's traps, of which each rule here is
one: docs/vllm.md.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Literal

import structlog
import trio

from tink.actors.backoff import Backoff
from tink.backends.flavour import flavour
from tink.backends.replica import (
    Aborted,
    AdapterMissing,
    Load,
    Refused,
    ReplicaGone,
    Sampled,
    Served,
    Unsent,
)
from tink.backends.trl import UNKNOWN_CONTEXT, TrlClient
from tink.backends.vllm import LogprobsMode, VllmClient
from tink.domain import adapters, rows
from tink.domain.events import AdapterPlaced, Subject
from tink.errors import BackendError
from tink.journal import upkeep
from tink.journal.journal import Entry, Journal
from tink.limits import (
    ADAPTERS_REGISTERED,
    REPLICA_BEAT_SECONDS,
    REPLICA_SLOTS,
    REPLICA_STALL_SECONDS,
)
from tink.trainer.protocol import SampleRequest
from tink.world import World

log = structlog.get_logger()

# Calls beside the samples: a look at the server, loading and unloading.
OWN_SLOTS = 4

BASE_ONLY = "a trl vllm-serve before 1.11 serves the base model alone: use `vllm serve`, or a newer TRL"


class _Life:
    """The server from when it had its adapters until it failed. `loaded`: by name, the one that was used
    last at the end. `using`: how many are about to send a request, or wait for one."""

    def __init__(self, server: VllmClient | TrlClient, served: Served) -> None:
        self.server, self.served = server, served
        self.loaded: OrderedDict[str, rows.Adapter] = OrderedDict()
        self.using: Counter[str] = Counter()
        self.loading = trio.Lock()
        self.load = Load(0, 0, 0.0, 0)
        self.calls: set[trio.CancelScope] = set()
        # Of `loaded`; and calls that ended well.
        self.changes = self.finished = 0
        self.suspect = False
        self.over: str | None = None

    @property
    def client(self) -> VllmClient:
        """Refused by an old TRL, which has no adapters."""
        if isinstance(self.server, TrlClient):
            raise Refused(f"{self.server.url}: {BASE_ONLY}")
        return self.server

    def end(self, reason: str) -> None:
        self.over = reason
        for call in list(self.calls):
            call.cancel()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around a call: ReplicaGone if the server fails meanwhile."""
        if self.over is not None:
            raise Unsent(self.over)
        with trio.CancelScope() as scope:
            self.calls.add(scope)
            try:
                yield
            finally:
                self.calls.discard(scope)
        if scope.cancelled_caught:
            raise ReplicaGone(self.over or "the server failed")


class VLLMActor:
    """`run` is its task. `limiter` is the server's queue: samples that are out, or wait to be. `changed` is
    called when it comes or goes."""

    def __init__(
        self,
        url: str,
        journal: Journal,
        folder: Path,
        world: World,
        changed: Callable[[], None],
        *,
        token: str = "",
        registered: int = ADAPTERS_REGISTERED,
    ) -> None:
        """`registered`: as many adapters are registered at most, but for those in use."""
        self.url, self._token = url, token
        self._journal, self._folder, self._world = journal, folder, world
        self._changed, self._registered = changed, registered
        self.limiter = trio.CapacityLimiter(REPLICA_SLOTS)
        # Samples that have seen a server die run one at a time, so that only one of them is to blame.
        self._suspects = trio.CapacityLimiter(1)
        self.outstanding = 0  # sequences
        self.reason = "it has not answered yet"
        self.served: Served | None = None
        self._life: _Life | None = None
        self._look = trio.Event()
        self._backoff = Backoff()
        self._told: str | None = None

    @property
    def up(self) -> bool:
        """Whether it takes requests."""
        return self._life is not None and not self._life.suspect

    @property
    def state(self) -> str:
        """For people: `ready`, or why it is waited for."""
        return "ready" if self.up else f"awaited: {self.reason}"

    @property
    def waiting(self) -> int:
        """Sequences that the server had in its queue when it was last looked at."""
        return 0 if self._life is None else self._life.load.waiting

    # -- the server ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Follows the server for ever."""
        while True:
            try:
                if await flavour(self.url, self._world) == "trl":
                    async with TrlClient.connect(self.url, self._world) as old:
                        await self._keep_old(old)
                async with VllmClient.connect(
                    self.url, self._world, slots=REPLICA_SLOTS + OWN_SLOTS, token=self._token
                ) as client:
                    await self._keep(client)
            except BackendError as error:
                self._lose(str(error))
            finally:
                if self._life is not None:  # cancelled, or a bug
                    self._lose("the worker stops following it")
            await self._backoff.pause()

    def _lose(self, reason: str) -> None:
        if self._life is not None:
            self._life.end(reason)
            self._life = None
            self._changed()
        elif reason == self._told:
            return
        self.reason = self._told = reason
        log.warning("vllm server lost", url=self.url, reason=reason)

    async def _keep(self, client: VllmClient) -> None:
        """Raises BackendError when it fails."""
        served = await client.served()
        # It samples a token for that: a server that is paused or draining is healthy and does not.
        mode = await self._probe(client, served)
        life = _Life(client, served)
        life.load = await client.load()  # one that says nothing of its load is of no use
        await self._reconcile(life)
        self._life, self.served, self._told, self.reason = life, served, None, "it answers"
        self._backoff.reset()
        log.info("vllm server ready", url=self.url, model=served.base_model, adapters=len(life.loaded))
        if mode == "processed":
            log.warning(
                "vllm server gives processed logprobs",
                url=self.url,
                remedy="start it with --logprobs-mode raw_logprobs: clients compare them with training's",
            )
        self._changed()
        progress, moved_at = (-1, 0), self._world.monotonic()
        while True:
            self._look = trio.Event()
            with trio.move_on_after(REPLICA_BEAT_SECONDS):
                await self._look.wait()
            await self._check(life, client)
            now = life.load.generated, life.finished
            if now != progress or not self.outstanding:
                progress, moved_at = now, self._world.monotonic()
            elif self._world.monotonic() - moved_at > REPLICA_STALL_SECONDS:
                # A long prompt takes its time, and lets a short one pass.
                await self._probe(client, served)
                moved_at = self._world.monotonic()

    async def _probe(self, client: VllmClient, served: Served) -> LogprobsMode:
        """Samples one token. ReplicaGone if it does not come."""
        with trio.move_on_after(REPLICA_STALL_SECONDS):
            return await client.logprobs_mode(served.base_model)
        raise ReplicaGone(
            f"it answers, and has sampled not one token in {REPLICA_STALL_SECONDS:.0f} s: is it paused?"
        )

    async def _keep_old(self, client: TrlClient) -> None:
        """An old `trl vllm-serve`: the base model, and nothing else. Raises BackendError when it fails."""
        # It does not say how large its context is, and hangs on a prompt that is longer.
        trainer = self._journal.last_trainer
        context = UNKNOWN_CONTEXT if trainer is None else trainer.max_context
        self.served = Served("base", "", context, {}, "trl")
        self._life, self._told, self.reason = _Life(client, self.served), None, "it answers"
        self._backoff.reset()
        log.warning("old trl server ready", url=self.url, remedy=BASE_ONLY)
        self._changed()
        while True:
            self._look = trio.Event()
            with trio.move_on_after(REPLICA_BEAT_SECONDS):
                await self._look.wait()
            if not await client.health():
                raise ReplicaGone("it is not healthy")
            self._life.suspect = False
            self._changed()

    async def _check(self, life: _Life, client: VllmClient) -> None:
        if not await client.health():
            raise ReplicaGone("it is not healthy")
        changes, before = life.changes, set(life.loaded)
        served = await client.served()
        lacks = before - served.adapters.keys()
        if lacks and changes == life.changes:  # else it may have been asked at any moment of theirs
            if lacks == before:
                raise ReplicaGone(f"it was restarted: its {len(lacks)} adapters are not there any more")
            for name in lacks:  # somebody has unloaded them: they are loaded when they are asked for
                life.loaded.pop(name, None)
        life.load = await client.load()
        if len(life.loaded) > self._registered:  # more were in use at once
            async with life.loading:
                await self._make_room(life)
        if life.suspect:
            try:
                await self._probe(client, served)
            except BackendError:
                if not life.calls:
                    raise
                return  # it drains: what it has under way may end well
            life.suspect = False
            self._changed()

    # -- its adapters -------------------------------------------------------------------------------

    async def _reconcile(self, life: _Life) -> None:
        """What is registered there and what should be, before there are requests."""
        ledger, there = self._journal.ledger, life.served.adapters
        live = {
            self._name(adapter): adapter
            for adapter in ledger.table("adapters", rows.Adapter).values()
            if adapter.state == "live"
        }
        for name, path in there.items():
            if not name.startswith(adapters.prefix(self._journal.home_id)):
                continue  # another worker's
            if name in live and path == self._path(live[name]):
                life.loaded[name] = live[name]
            else:
                await life.client.unload_adapter(name)
        found = {adapter.adapter_id for adapter in life.loaded.values()}
        for adapter in adapters.wanted(ledger)[-self._registered :]:
            try:
                await self._load(life, adapter)
            except Refused as error:  # whoever samples from it is told
                log.error("adapter not loaded", adapter=adapter.adapter_id, reason=str(error))
        placed = await self._journal.read(partial(upkeep.placed, replica=self.url))
        before = {adapter.adapter_id for adapter in placed}
        gone = [adapter for adapter in placed if adapter.adapter_id not in found]
        new = [a for a in life.loaded.values() if a.adapter_id not in found & before]
        entries = [self._placed(a, "gone") for a in gone] + [self._placed(a, "loaded") for a in new]
        if entries:
            await self._journal.append(*entries)

    @asynccontextmanager
    async def _using(self, life: _Life, adapter: rows.Adapter | None) -> AsyncIterator[str]:
        """The name by which the server has it, for as long as it is needed there."""
        if adapter is None:
            yield life.served.base_model
            return
        name = self._name(adapter)
        life.using[name] += 1
        try:
            try:
                new = await self._load(life, adapter)
            except ReplicaGone as error:
                raise Unsent(str(error)) from error
            if new:
                await self._journal.append(self._placed(adapter, "loaded"))
            yield name
        finally:
            life.using[name] -= 1
            if not life.using[name]:
                del life.using[name]

    async def _load(self, life: _Life, adapter: rows.Adapter) -> bool:
        """Registers it, if it is not; whether it had to."""
        name = self._name(adapter)
        if name in life.loaded:  # no waiting for those that load others
            await trio.lowlevel.checkpoint()
            life.loaded.move_to_end(name)
            return False
        async with life.loading:
            new = name not in life.loaded
            if new:
                await self._make_room(life, 1)
                await life.client.load_adapter(name, self._path(adapter))
                life.loaded[name] = adapter
                life.changes += 1
            life.loaded.move_to_end(name)
        return new

    async def _make_room(self, life: _Life, room: int = 0) -> None:
        """Takes out those that nobody has used for longest, and never one in use."""
        idle = [name for name in life.loaded if not life.using[name]]
        for name in idle[: max(0, len(life.loaded) + room - self._registered)]:
            await self._unload(life, name)

    async def _unload(self, life: _Life, name: str) -> None:
        adapter = life.loaded.pop(name)  # first, so that its absence there is no surprise
        life.changes += 1
        await life.client.unload_adapter(name)
        with suppress(LookupError):  # it was placed for a job that failed then: nobody was told of it
            await self._journal.adapter(adapter.adapter_id)
            await self._journal.append(self._placed(adapter, "gone"))

    async def place(self, adapter: rows.Adapter) -> bool:
        """Registers a version that is not journaled yet: its placement is the caller's to journal. False if
        the server is not there; raises Refused if it will not have it."""
        life = self._life
        if life is None:
            return False
        try:
            with life.call():
                await self._load(life, adapter)
        except ReplicaGone as error:
            self._doubt(life, error)
            return False
        return True

    async def remove(self, adapter: rows.Adapter) -> None:
        """Takes a version out that nobody will sample from any more; one whose server is not there is taken
        out when it comes back."""
        life, name = self._life, self._name(adapter)
        if life is None or name not in life.loaded or life.using[name]:
            return
        try:
            with life.call():
                async with life.loading:
                    if name in life.loaded:
                        await self._unload(life, name)
        except ReplicaGone as error:
            self._doubt(life, error)
        except BackendError as error:
            log.warning("adapter not unloaded", adapter=adapter.adapter_id, reason=str(error))

    def _name(self, adapter: rows.Adapter) -> str:
        return adapters.served_name(self._journal.home_id, adapter)

    def _path(self, adapter: rows.Adapter) -> str:
        return str(self._folder / adapter.directory)

    def _placed(self, adapter: rows.Adapter, state: Literal["loaded", "gone"]) -> Entry:
        subject = Subject(
            tenant=adapter.tenant,
            model_id=adapter.model_id,
            adapter_id=adapter.adapter_id,
            replica=self.url,
        )
        return subject, AdapterPlaced(state=state)

    # -- samples ------------------------------------------------------------------------------------

    async def sample(
        self, request: SampleRequest, adapter: rows.Adapter | None, *, suspect: bool
    ) -> Sampled:
        """Raises ReplicaGone if it should be sent elsewhere, BackendError or UserError if it will not be
        served. `suspect`: it was out when a server died."""
        self.outstanding += request.num_samples
        try:
            async with self._suspects if suspect else nullcontext(), self.limiter:
                life = self._life
                if life is None:
                    raise Unsent(self.reason)
                try:
                    with life.call():
                        sampled = await self._sample(life, request, adapter)
                        life.finished += 1
                        return sampled
                except ReplicaGone as error:
                    self._doubt(life, error)
                    raise
        finally:
            self.outstanding -= request.num_samples
            self._changed()

    async def _sample(self, life: _Life, request: SampleRequest, adapter: rows.Adapter | None) -> Sampled:
        if isinstance(life.server, TrlClient) and adapter is None:
            return await life.server.sample(request, max_context=life.served.max_context)
        async with self._using(life, adapter) as name:
            try:
                return await life.client.sample(request, model=name, max_context=life.served.max_context)
            except AdapterMissing as error:
                if adapter is None:
                    raise ReplicaGone(f"it does not serve its base model: {error}") from error
                # Somebody has unloaded it, or the server is another one.
                life.loaded.pop(name, None)
                await self._load(life, adapter)
            return await life.client.sample(request, model=name, max_context=life.served.max_context)

    def _doubt(self, life: _Life, error: ReplicaGone) -> None:
        """No more requests until it was looked at."""
        life.suspect = True
        self.reason = str(error)
        self._look.set()
        self._changed()
        kind = "aborted" if isinstance(error, Aborted) else "lost"
        log.warning("vllm call " + kind, url=self.url, reason=str(error))
