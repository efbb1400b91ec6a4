"""The adapter versions that one vLLM server has, from when it came until it fails.

`ReplicaAdapters.run` alone loads and unloads, one after the other; whoever needs a version orders it, and
waits for nothing but that one. Never under one name what has changed, never unloaded what is in use, and
never one more that has killed the server again and again: docs/vllm.md.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import structlog
import trio

from tink.actors import placements
from tink.actors.artifacts import ArtifactFolder
from tink.backends.replica import Refused, ReplicaGone, Unsent
from tink.backends.vllm import VllmClient
from tink.domain import adapters, rows
from tink.errors import BackendError
from tink.journal import upkeep
from tink.journal.journal import Journal

log = structlog.get_logger()


class LoadFailures:
    """How often servers have failed while they loaded an adapter, by its name: one that kills them must not
    do so for ever. Of all servers together."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._counts: Counter[str] = Counter()

    def doubtful(self, name: str) -> bool:
        return self._counts[name] > 0

    def add(self, name: str) -> None:
        self._counts[name] += 1

    def forget(self, name: str) -> None:
        self._counts.pop(name, None)

    def check(self, name: str) -> None:
        """Raises Refused if it was tried often enough."""
        if self._counts[name] >= self._most:
            raise Refused(
                f"vLLM servers failed {self._counts[name]} times while they loaded the adapter {name!r}; "
                f"given up after TINK_MAX_ATTEMPTS={self._most} until the worker is started again: their "
                "logs say why"
            )


@dataclass(eq=False)
class _Order:
    """`known`: the version is journaled, and so is what becomes of the order."""

    adapter: rows.Adapter
    known: bool
    done: trio.Event = field(default_factory=trio.Event)
    error: BackendError | None = None


class ReplicaAdapters:
    """`most`: as many are registered at most, but for those in use. `doubt` is told when the server fails
    in loading or unloading."""

    def __init__(
        self,
        client: VllmClient,
        journal: Journal,
        folder: ArtifactFolder,
        failures: LoadFailures,
        doubt: Callable[[ReplicaGone], None],
        *,
        most: int,
    ) -> None:
        self._client, self._journal, self._folder = client, journal, folder
        self._failures, self._doubt, self._most = failures, doubt, most
        # By name; the one that was used last at the end.
        self._loaded: OrderedDict[str, rows.Adapter] = OrderedDict()
        # Name -> path of what this home has left there, and does not know.
        self._strays: dict[str, str] = {}
        # How many are about to send a request, or wait for one.
        self._using: Counter[str] = Counter()
        self._orders: dict[str, _Order] = {}
        self._untold: list[tuple[rows.Adapter, placements.State, str]] = []
        # What could not be unloaded, until the next look; and all that ever could not.
        self._stuck: set[str] = set()
        self._complained: set[str] = set()
        # Being loaded or unloaded.
        self._moving: str | None = None
        self._wake, self._idle = trio.Event(), trio.Event()
        self.changes = 0

    def __len__(self) -> int:
        return len(self._loaded)

    @property
    def directories(self) -> set[str]:
        """Those that the server may read again, relative to the artifact folder."""
        ours = [*self._loaded.values(), *(order.adapter for order in self._orders.values())]
        root = f"{self._folder.root}/"
        strays = {path.removeprefix(root) for path in self._strays.values() if path.startswith(root)}
        return {adapter.directory for adapter in ours} | strays

    # -- for those who need them ----------------------------------------------------------------------

    @asynccontextmanager
    async def using(self, adapter: rows.Adapter) -> AsyncIterator[str]:
        """The name by which the server has it, for as long as it is needed there. Raises Refused if the
        server will not have it, Unsent if it fails."""
        name = self._name(adapter)
        self._using[name] += 1
        try:
            try:
                await self.load(adapter)
            except ReplicaGone as error:
                raise Unsent(str(error)) from error
            yield name
        finally:
            self._using[name] -= 1
            if not self._using[name]:
                del self._using[name]

    async def load(self, adapter: rows.Adapter, *, known: bool = True) -> None:
        """Returns once the server has it. `known`: False if the journal does not tell of it yet, and its
        placement is the caller's to journal. Raises Refused, or ReplicaGone if the server fails. Cancelled,
        it is loaded nevertheless, and taken out again if nobody needs it."""
        name = self._name(adapter)
        if name in self._loaded and name != self._moving:
            await trio.lowlevel.checkpoint()
            if name in self._loaded:
                self._loaded.move_to_end(name)
            return
        order = self._order(adapter, known)
        await order.done.wait()
        if order.error is not None:  # each who waits has one of his own
            kind = ReplicaGone if isinstance(order.error, ReplicaGone) else Refused
            raise kind(str(order.error))

    def lost(self, adapter: rows.Adapter) -> None:
        """The server has said that it does not have it."""
        name = self._name(adapter)
        if name != self._moving and self._loaded.pop(name, None) is not None:
            self._tell(adapter, "gone")

    def want(self) -> None:
        """Orders what a server should have before it gets requests. What servers have failed at waits
        until somebody asks for it."""
        for adapter in adapters.wanted(self._journal.ledger)[-self._most :]:
            name = self._name(adapter)
            if name not in self._loaded and not self._failures.doubtful(name):
                self._order(adapter, known=True)

    def observe(self, there: Mapping[str, str], since: int) -> None:
        """What the server says that it has, asked for when `changes` was `since`: somebody may have loaded
        or unloaded behind our back, or an answer was lost."""
        self._stuck.clear()
        if since == self.changes and self._moving is None:  # else any moment may be meant
            missing = [adapter for name, adapter in self._loaded.items() if name not in there]
            for adapter in missing:
                self.lost(adapter)
            self._strays = {
                name: path
                for name, path in there.items()
                if name.startswith(self._prefix) and name not in self._loaded
            }
            if missing:
                self.want()
        self._wake.set()

    async def tidy(self) -> None:
        """Returns once what nobody needs any more was taken out, or could not be."""
        idle = self._idle
        self._wake.set()
        await idle.wait()

    # -- the one who does it --------------------------------------------------------------------------

    async def reconcile(self, there: Mapping[str, str]) -> None:
        """What the server has when it comes, and what it should have: returns once it has that. `run` must
        be running. Raises ReplicaGone if it fails."""
        live = {
            self._name(adapter): adapter
            for adapter in self._journal.ledger.table("adapters", rows.Adapter).values()
            if adapter.state == "live"
        }
        for name, path in there.items():
            if name in live and path == self._path(live[name]):
                self._loaded[name] = live[name]
            elif name.startswith(self._prefix):
                self._strays[name] = path
        found = {adapter.adapter_id: adapter for adapter in self._loaded.values()}
        placed = await self._journal.read(partial(upkeep.placements, replica=self._client.url))
        before = {adapter.adapter_id for adapter, _ in placed}
        for adapter, _ in placed:
            if adapter.adapter_id not in found:
                self._tell(adapter, "gone")
        for key, adapter in found.items():
            if key not in before:
                self._tell(adapter, "loaded")
        self.want()
        self._wake.set()
        orders = list(self._orders.values())
        for order in orders:
            await order.done.wait()
            if isinstance(order.error, ReplicaGone):
                raise order.error
        await self.tidy()

    async def run(self) -> None:
        """Loads and unloads, for ever. What goes wrong is told to whoever waits, and to `doubt`."""
        while True:
            self._wake = trio.Event()
            await self._journal_placements()
            if self._strays:
                await self._unload(next(iter(self._strays)))
            elif self._orders:
                name, order = next(iter(self._orders.items()))
                await self._serve(name, order)
            elif (spare := self._spare()) is not None:
                await self._unload(spare)
            elif not self._untold:
                idle, self._idle = self._idle, trio.Event()
                idle.set()
                await self._wake.wait()

    async def _serve(self, name: str, order: _Order) -> None:
        adapter, url = order.adapter, self._client.url
        try:
            self._failures.check(name)
            await self._folder.check(adapter.directory, adapter.files)  # vLLM would not notice
            await self._make_room()
            await self._load(name, adapter)
        except BackendError as error:
            order.error = error
            if isinstance(error, ReplicaGone):
                self._doubt(error)
            else:
                log.error("adapter not loaded", url=url, adapter=adapter.adapter_id, reason=str(error))
                self._tell(adapter, "refused", str(error))
        else:
            if order.known:
                self._tell(adapter, "loaded")
                await self._journal_placements()
        finally:
            del self._orders[name]
            order.done.set()

    async def _load(self, name: str, adapter: rows.Adapter) -> None:
        self._moving = name
        try:
            await self._client.load_adapter(name, self._path(adapter))
        except Unsent:
            raise
        except (ReplicaGone, trio.Cancelled):  # cancelled: the server has failed meanwhile
            self._failures.add(name)
            raise
        finally:
            self._moving = None
        self._failures.forget(name)
        self._loaded[name] = adapter
        self.changes += 1

    async def _make_room(self) -> None:
        """For one more: takes out those that nobody has used for longest, and never one in use."""
        for name in list(self._loaded):
            if len(self._loaded) < self._most:
                return
            if not self._using[name] and not await self._unload(name):
                return  # rather one too many

    async def _unload(self, name: str) -> bool:
        self._moving = name
        try:
            await self._client.unload_adapter(name)
        except BackendError as error:
            if name not in self._complained:
                log.warning("adapter not unloaded", url=self._client.url, name=name, reason=str(error))
                self._complained.add(name)
            self._stuck.add(name)
            self._strays.pop(name, None)  # it is found again by the next look
            if isinstance(error, ReplicaGone):
                self._doubt(error)
            return False
        finally:
            self._moving = None
            self.changes += 1
        self._strays.pop(name, None)
        adapter = self._loaded.pop(name, None)
        if adapter is not None:
            self._tell(adapter, "gone")
        return True

    def _spare(self) -> str | None:
        """One that is to be taken out: nobody will sample from it any more, or they are too many."""
        idle = [name for name in self._loaded if not self._using[name] and name not in self._stuck]
        if idle and len(self._loaded) > self._most:
            return idle[0]
        return next((name for name in idle if not self._is_needed(self._loaded[name])), None)

    def _is_needed(self, adapter: rows.Adapter) -> bool:
        ledger = self._journal.ledger
        row = ledger.table("adapters", rows.Adapter).get((adapter.adapter_id,))
        if row is not None and row.state == "live" and row.directory == adapter.directory:
            return True
        # The job that makes it has not ended.
        job = ledger.table("jobs", rows.Job).get((adapter.job_id,))
        return job is not None and job.state in rows.OPEN

    def _tell(self, adapter: rows.Adapter, state: placements.State, reason: str = "") -> None:
        self._untold.append((adapter, state, reason))
        self._wake.set()

    async def _journal_placements(self) -> None:
        untold, self._untold = self._untold, []
        entries = [
            placements.entry(adapter, self._client.url, state, reason)
            for adapter, state, reason in untold
            if await self._is_journaled(adapter)
        ]
        if entries:
            await self._journal.append(*entries)

    async def _is_journaled(self, adapter: rows.Adapter) -> bool:
        """The job that it was placed for may not have ended yet, or have failed."""
        with suppress(LookupError):
            return (await self._journal.adapter(adapter.adapter_id)).directory == adapter.directory
        return False

    def _order(self, adapter: rows.Adapter, known: bool) -> _Order:
        order = self._orders.setdefault(self._name(adapter), _Order(adapter, known))
        self._wake.set()
        return order

    @property
    def _prefix(self) -> str:
        return adapters.prefix(self._journal.home_id)

    def _name(self, adapter: rows.Adapter) -> str:
        return adapters.served_name(self._journal.home_id, adapter)

    def _path(self, adapter: rows.Adapter) -> str:
        return str(self._folder.root / adapter.directory)
