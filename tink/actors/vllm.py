"""One vLLM server: whether it is there, and the samples that it runs.

It is away until it answers, samples, and has its adapters; then it is ready. A call that goes wrong, or a
look that it leaves unanswered, puts it in doubt: no more requests, until it has been looked at. One that
fails, hangs or was restarted is away again, and what it was running is moved. vLLM's traps, of which each
rule here is one: docs/vllm.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NoReturn, Protocol

import structlog
import trio

from tink.actors.artifacts import ArtifactFolder
from tink.actors.backoff import Backoff
from tink.actors.placements import Placements
from tink.actors.replica_adapters import LoadFailures, ReplicaAdapters
from tink.backends import same_model
from tink.backends.flavour import flavour
from tink.backends.replica import (
    Aborted,
    AdapterMissing,
    Load,
    Probe,
    ReplicaGone,
    ReplicaRefused,
    Served,
    Silent,
    Unsent,
)
from tink.backends.trl import UNKNOWN_CONTEXT, TrlClient
from tink.backends.vllm import VllmClient
from tink.domain import rows
from tink.domain.events import TrainerStarted
from tink.errors import BackendError
from tink.journal.journal import Journal
from tink.limits import (
    ADAPTERS_REGISTERED,
    REPLICA_BEAT_SECONDS,
    REPLICA_OWN_SLOTS,
    REPLICA_PAUSED_SECONDS,
    REPLICA_SILENT_SECONDS,
    REPLICA_SLOTS,
    REPLICA_STALL_SECONDS,
    SUSPECTS_TOGETHER,
)
from tink.wire.samples import Sampled
from tink.wire.tink_train import SampleRequest
from tink.world import World

log = structlog.get_logger()

# How a sample is out: a suspect has seen a server die. It is out with few others at first, and alone in the
# end, so that only one of them can be to blame.
Exposure = Literal["free", "suspect", "alone"]
# How many of each at once.
EXPOSURES: dict[Exposure, int] = {"free": REPLICA_SLOTS, "suspect": SUSPECTS_TOGETHER, "alone": 1}

BASE_ONLY = "a trl vllm-serve before 1.11 serves the base model alone: use `vllm serve`, or a newer TRL"


class _Call:
    """`sent`: the server may be running it."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.sent = False


class _Life:
    """The server from when it had its adapters until it fails. `adapters`: None if it takes none.
    `finished`: calls that ended well. `doubt`, `over`: why."""

    def __init__(
        self, server: VllmClient | TrlClient, served: Served, adapters: ReplicaAdapters | None
    ) -> None:
        self.server, self.served, self.adapters = server, served, adapters
        self.load = Load(0, 0, 0)
        self.calls: set[_Call] = set()
        self.finished = 0
        self.compared_with: TrainerStarted | None = None
        self.doubt: ReplicaGone | None = None
        self.looked_at: ReplicaGone | None = None  # the doubt that there was at the last look
        self.over: str | None = None

    def end(self, reason: str) -> None:
        self.over = reason
        for call in list(self.calls):
            call.scope.cancel()

    @contextmanager
    def call(self) -> Iterator[_Call]:
        """Around a call: if the server fails meanwhile ReplicaGone, or Unsent if it has nothing of it."""
        if self.over is not None:
            raise Unsent(self.over)
        call = _Call()
        with call.scope:
            self.calls.add(call)
            try:
                yield call
            finally:
                self.calls.discard(call)
        if call.scope.cancelled_caught:
            reason = self.over or "the server failed"
            raise ReplicaGone(reason) if call.sent else Unsent(reason)


class Peers(Protocol):
    """What a server belongs to. `placements`, `failures`: of all of them."""

    placements: Placements
    failures: LoadFailures

    def changed(self) -> None:
        """One begins or ceases to take requests."""

    def compare(self, newcomer: VLLMActor, served: Served, probe: Probe | None) -> None:
        """Raises ReplicaRefused if it may not serve beside the others."""

    def trained(self) -> TrainerStarted | None:
        """What the trainer serves, if one is used and known."""


class VLLMActor:
    """`run` is its task."""

    def __init__(
        self,
        url: str,
        journal: Journal,
        folder: ArtifactFolder,
        world: World,
        peers: Peers,
        *,
        token: str = "",
        registered: int = ADAPTERS_REGISTERED,
    ) -> None:
        """`registered`: as many adapters are registered at most, but for those in use."""
        self.url, self._token = url, token
        self._journal, self._folder, self._world = journal, folder, world
        self._peers, self._registered = peers, registered
        self.outstanding = 0  # sequences
        self._out: Counter[Exposure] = Counter()
        self.reason = "it has not answered yet"
        # Of the present server, or the one before.
        self.served: Served | None = None
        self.probe: Probe | None = None
        # Why it takes no adapters.
        self.lacks = ""
        self._life: _Life | None = None
        self._look = trio.Event()
        self._backoff = Backoff()
        self._told: str | None = None

    @property
    def there(self) -> bool:
        """Whether it serves, though it may be in doubt."""
        return self._life is not None

    @property
    def up(self) -> bool:
        """Whether it takes requests."""
        return self._life is not None and self._life.doubt is None

    @property
    def state(self) -> str:
        """For people: `ready`, and what it lacks; or why it is waited for."""
        if not self.up:
            return f"awaited: {self.reason}"
        return f"ready, for the base model alone: {self.lacks}" if self.lacks else "ready"

    @property
    def waiting(self) -> int:
        """Sequences that the server had in its queue when it was last looked at."""
        return 0 if self._life is None else self._life.load.waiting

    # -- the server -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Follows the server for ever."""
        while True:
            reason = "the worker has stopped following it"
            try:
                reason = await self._follow()
            except BackendError as error:
                reason = str(error)
            finally:
                self._lose(reason)
            await self._backoff.pause()

    def _lose(self, reason: str) -> None:
        if self._life is not None:
            life, self._life = self._life, None
            life.end(reason)
            self._peers.changed()
        elif reason == self._told:
            return
        self.reason = self._told = reason
        log.warning("vllm server lost", url=self.url, reason=reason)

    def _take(self, life: _Life) -> None:
        self._life, self.served, self._told, self.reason = life, life.served, None, "it answers"
        self._backoff.reset()
        self._peers.changed()

    async def _follow(self) -> str:
        """Until it fails: why."""
        if await flavour(self.url, self._world, self._token) == "trl":
            async with TrlClient.connect(self.url, self._world) as old:
                return await self._follow_old(old)
        async with (
            VllmClient.connect(
                self.url, self._world, slots=REPLICA_SLOTS + REPLICA_OWN_SLOTS, token=self._token
            ) as client,
            trio.open_nursery() as nursery,
        ):
            try:
                life = await self._meet(client, nursery)
                await self._watch(life, client)
            except BackendError as error:
                reason = str(error)
                self._lose(reason)  # before the nursery ends, and with it the server's adapters
            nursery.cancel_scope.cancel()
        return reason

    async def _meet(self, client: VllmClient, nursery: trio.Nursery) -> _Life:
        served = await client.served()
        # It samples a token for that: a server that is paused or draining is healthy and does not.
        probe = await self._probe(client, served)
        life = _Life(client, served, None)
        await self._check_base_model(life)
        life.load = await client.load()  # one that says nothing of its load is of no use
        self.lacks = ""
        try:
            await client.check_takes_adapters()
        except ReplicaRefused as error:
            self.lacks = str(error)
            log.warning("vllm server serves the base model alone", url=self.url, reason=self.lacks)
        else:
            life.adapters = ReplicaAdapters(
                client,
                served.adapters,
                self._journal,
                self._folder,
                self._peers.placements,
                self._peers.failures,
                self._doubt,
                most=self._registered,
            )
            nursery.start_soon(life.adapters.run)
            await life.adapters.complete()
        self._peers.compare(self, served, probe)
        self.probe = probe
        self._take(life)
        count = 0 if life.adapters is None else len(life.adapters)
        log.info("vllm server ready", url=self.url, model=served.base_model, adapters=count)
        if probe.mode == "processed":
            log.warning(
                "vllm server gives processed logprobs",
                url=self.url,
                remedy="start it with --logprobs-mode raw_logprobs: clients compare them with training's",
            )
        return life

    async def _watch(self, life: _Life, client: VllmClient) -> NoReturn:
        """Raises BackendError when it fails."""
        progress, moved_at, heard_at = (-1, 0), self._world.monotonic(), self._world.monotonic()
        while True:
            await self._next_look()
            began = self._world.monotonic()
            try:
                await self._check(life, client)
                now = life.load.generated, life.finished
                if now != progress or not self.outstanding:
                    progress, moved_at = now, began
                elif began - moved_at > REPLICA_STALL_SECONDS:
                    # A long prompt takes its time, and lets a short one pass.
                    await self._probe(client, life.served)
                    moved_at = self._world.monotonic()
            except (Silent, Unsent) as error:
                # What was under way when it was last heard of may have taken long itself.
                self._doubt(error)
                self._look = trio.Event()  # it was this look that has met it: the next one is in a while
                if began - heard_at > REPLICA_SILENT_SECONDS:
                    raise
            else:
                heard_at = self._world.monotonic()

    async def _next_look(self) -> None:
        """After a while, or a doubt."""
        with trio.move_on_after(REPLICA_BEAT_SECONDS):
            await self._look.wait()
        self._look = trio.Event()

    async def _check(self, life: _Life, client: VllmClient) -> None:
        doubt, before = life.doubt, life.load.generated
        if not await client.health():
            raise ReplicaGone("it is not healthy")
        if life.adapters is not None:
            since = life.adapters.changes
            life.adapters.observe((await client.served()).adapters, since)
        load = await client.load()
        if load.generated < before:
            raise ReplicaGone(
                "it was restarted; or several servers answer at this URL: then list each of them in "
                "VLLM_BASE_URL"
            )
        life.load = load
        await self._check_base_model(life)
        if doubt is None:
            return
        aborts = isinstance(doubt, Aborted)
        refuses = aborts or isinstance(doubt, Unsent)
        is_new, life.looked_at = life.looked_at is not doubt, doubt
        if is_new and life.calls and not refuses:
            return  # what it generates from now on shows that it works
        if refuses or load.generated == before:
            try:
                # One that has aborted something is paused, or drains, and that is told sooner.
                await self._probe(client, life.served, REPLICA_PAUSED_SECONDS if aborts else None)
            except Aborted:
                if not life.calls:
                    raise
                return  # it drains: what it has under way may end well
        if life.doubt is doubt:
            life.doubt, self.reason = None, "it answers"
            self._peers.changed()

    async def _check_base_model(self, life: _Life) -> None:
        """Raises ReplicaRefused if it is not the one that is trained."""
        trainer = self._peers.trained()
        if trainer is not None and trainer is not life.compared_with:
            await same_model.check_trained(trainer, life.served, self.url, self._world)
            life.compared_with = trainer

    async def _probe(self, client: VllmClient, served: Served, patience: float | None = None) -> Probe:
        """Samples one token. ReplicaGone if it does not come, and none of others either."""
        seconds = patience or REPLICA_STALL_SECONDS
        while True:
            before = (await client.load()).generated
            with trio.move_on_after(seconds):
                return await client.probe(served.base_model)
            if (await client.load()).generated == before:
                raise ReplicaGone(
                    f"it answers, and has sampled not one token in {seconds:.0f} s: is it paused?"
                )
            seconds *= 2  # it has much to do

    async def _follow_old(self, client: TrlClient) -> str:
        """An old `trl vllm-serve`: the base model, and nothing else."""
        life = _Life(client, Served("base", "", UNKNOWN_CONTEXT, {}), None)
        self._peers.compare(self, life.served, None)
        self.lacks, self.probe = f"{self.url}: {BASE_ONLY}", None
        self._take(life)
        log.warning("old trl server ready", url=self.url, remedy=BASE_ONLY)
        while True:
            await self._next_look()
            doubt = life.doubt
            if not await client.health():
                return "it is not healthy"
            if doubt is not None and life.doubt is doubt:
                life.doubt = None
                self._peers.changed()

    # -- adapters -------------------------------------------------------------------------------------

    async def place(self, adapter: rows.Adapter) -> bool:
        """Registers a version that is not journaled yet: its placement is the caller's to journal. False if
        the server is not there, or fails; raises ReplicaRefused if it will not have it."""
        life = self._life
        if life is None:
            return False
        try:
            with life.call():
                await self._adapters(life).load(adapter)
        except ReplicaGone:
            return False
        return True

    async def tidy(self) -> None:
        """Takes out what nobody will sample from any more; one that is not there does when it comes."""
        life = self._life
        if life is None or life.adapters is None:
            return
        try:
            with life.call():
                await life.adapters.tidy()
        except ReplicaGone:
            return

    @property
    def directories(self) -> set[str]:
        """Those of adapters that it has, and may read again."""
        life = self._life
        return set() if life is None or life.adapters is None else life.adapters.directories

    def _adapters(self, life: _Life) -> ReplicaAdapters:
        if life.adapters is None:
            raise ReplicaRefused(self.lacks)
        return life.adapters

    # -- samples --------------------------------------------------------------------------------------

    def has_room(self, exposure: Exposure) -> bool:
        """Whether it takes one more of these."""
        return self.up and self._out.total() < REPLICA_SLOTS and self._out[exposure] < EXPOSURES[exposure]

    @contextmanager
    def slot(self, request: SampleRequest, exposure: Exposure) -> Iterator[None]:
        """Around a sample that it has room for."""
        self._out[exposure] += 1
        self.outstanding += request.num_samples
        try:
            yield
        finally:
            self._out[exposure] -= 1
            self.outstanding -= request.num_samples

    async def sample(self, request: SampleRequest, adapter: rows.Adapter | None) -> Sampled:
        """Raises ReplicaGone or AdapterMissing if it should be sent elsewhere, ReplicaRefused or UserError
        if it will not be served. Cancelled, the server gives it up."""
        life = self._life
        if life is None or life.doubt is not None:
            raise Unsent(self.reason)
        try:
            with life.call() as call:
                sampled = await self._sample(life, call, request, adapter)
        except ReplicaGone as error:
            self._doubt(error, life)
            raise
        life.finished += 1
        return sampled

    async def _sample(
        self, life: _Life, call: _Call, request: SampleRequest, adapter: rows.Adapter | None
    ) -> Sampled:
        server, served = life.server, life.served
        if isinstance(server, TrlClient):
            if adapter is not None:
                raise ReplicaRefused(self.lacks)
            # It does not say how large its context is, and hangs on a prompt that is longer.
            trained = self._peers.trained()
            context = served.max_context if trained is None else trained.max_context
            async with server.turn:
                call.sent = True
                return await server.sample(request, max_context=context)
        if adapter is None:
            call.sent = True
            try:
                return await server.sample(request, model=served.base_model, max_context=served.max_context)
            except AdapterMissing as error:
                raise ReplicaGone(f"it does not serve its base model: {error}") from error
        adapters = self._adapters(life)
        async with adapters.using(adapter) as name:
            call.sent = True
            try:
                return await server.sample(request, model=name, max_context=served.max_context)
            except AdapterMissing:  # somebody has unloaded it
                call.sent = False
                adapters.lost(adapter)
        async with adapters.using(adapter) as name:
            call.sent = True
            return await server.sample(request, model=name, max_context=served.max_context)

    def _doubt(self, error: ReplicaGone, life: _Life | None = None) -> None:
        """No more requests until it was looked at. `life`: which; the present one."""
        kind = "aborted" if isinstance(error, Aborted) else "lost"
        log.warning("vllm call " + kind, url=self.url, reason=str(error))
        life = life or self._life
        if life is not None and life is self._life:
            if not isinstance(life.doubt, Aborted):  # which nothing but a sample can refute
                life.doubt = error
            self.reason = str(error)
            self._look.set()
            self._peers.changed()
