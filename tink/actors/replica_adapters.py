"""The adapter versions that one vLLM server has, from when it came until it fails.

`ReplicaAdapters.run` alone loads and unloads, one after the other; whoever needs a version orders it, and
waits for nothing but that one. Never under one name what has changed, never unloaded what is in use, and
never again what has killed servers again and again: docs/vllm.md.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import structlog
import trio

from tink.actors import placements
from tink.actors.artifacts import ArtifactFolder
from tink.actors.placements import Placements
from tink.backends.replica import ReplicaGone, ReplicaRefused, Unsent
from tink.backends.vllm import VllmClient
from tink.domain import adapters, rows
from tink.domain.events import Entry
from tink.errors import BackendError
from tink.journal.journal import Journal
from tink.limits import LOAD_FAILURES_SECONDS, LOAD_ROUND_SECONDS
from tink.world import World

log = structlog.get_logger()


class LoadFailures:
    """How often servers have failed while they loaded an adapter, by its name: one that kills them must not
    do so for ever. Of all servers together; what fails in one go counts once, and not for ever, for
    something else may have been the reason."""

    def __init__(self, world: World, *, most: int) -> None:
        self._world, self._most = world, most
        # (when, which server), the last one last.
        self._seen: defaultdict[str, list[tuple[float, str]]] = defaultdict(list)

    def doubtful(self, name: str) -> bool:
        return bool(self._recent(name))

    def add(self, name: str, url: str) -> None:
        recent, now = self._recent(name), self._world.monotonic()
        if not recent or now - recent[-1][0] > LOAD_ROUND_SECONDS:
            self._seen[name] = [*recent, (now, url)]

    def forget(self, name: str, url: str) -> None:
        """The server has loaded it."""
        self._seen[name] = [(at, where) for at, where in self._recent(name) if where != url]
        self._recent(name)

    def check(self, name: str) -> None:
        """Raises ReplicaRefused if it was tried often enough."""
        count = len(self._recent(name))
        if count >= self._most:
            raise ReplicaRefused(
                f"vLLM servers failed {count} times while they loaded the adapter {name!r}; given up after "
                f"TINK_MAX_ATTEMPTS={self._most}, for {LOAD_FAILURES_SECONDS / 60:.0f} minutes: their logs "
                "say why"
            )

    def _recent(self, name: str) -> list[tuple[float, str]]:
        since = self._world.monotonic() - LOAD_FAILURES_SECONDS
        recent = [failure for failure in self._seen.pop(name, ()) if failure[0] >= since]
        if recent:
            self._seen[name] = recent
        return recent


@dataclass(eq=False)
class _Held:
    """What the server has under a name. `adapter`: None for what this home has left there, and does not
    know. `stuck`: it could not be unloaded; tried again after the next look, and told of once."""

    path: str
    adapter: rows.Adapter | None
    stuck: bool = False
    told: bool = False


@dataclass(eq=False)
class _Order:
    """`error`: why it is not there, when `done` is set."""

    adapter: rows.Adapter
    done: trio.Event = field(default_factory=trio.Event)
    error: BackendError | None = field(
        default_factory=lambda: Unsent("the server is not followed any more")
    )


class ReplicaAdapters:
    """Begins with what the server says that it has: `there`, name -> path. `most`: as many are registered
    at most, but for those in use. `doubt` is told when the server fails in loading or unloading."""

    def __init__(
        self,
        client: VllmClient,
        there: Mapping[str, str],
        journal: Journal,
        folder: ArtifactFolder,
        placements: Placements,
        failures: LoadFailures,
        doubt: Callable[[ReplicaGone], None],
        *,
        most: int,
    ) -> None:
        self._client, self._journal, self._folder = client, journal, folder
        self._placements, self._failures, self._doubt = placements, failures, doubt
        self._most, self._exported = most, placements.exported
        # By name; the one that was used last at the end.
        self._held: OrderedDict[str, _Held] = OrderedDict()
        # How many are about to send a request, or wait for one.
        self._using: Counter[str] = Counter()
        self._orders: dict[str, _Order] = {}
        # To be taken out, as of the last look.
        self._spare: list[str] = []
        self._refusals: list[Entry] = []
        # Being loaded or unloaded.
        self._moving: str | None = None
        self._wake, self._idle = trio.Event(), trio.Event()
        self.changes = 0
        live = {
            self._name(adapter): adapter
            for adapter in journal.ledger.adapters.values()
            if adapter.state == "live"
        }
        for name, path in there.items():
            if name in live and path == self._path(live[name]):
                self._held[name] = _Held(path, live[name])
            elif name.startswith(self._prefix):
                self._held[name] = _Held(path, None)

    def __len__(self) -> int:
        return sum(held.adapter is not None for held in self._held.values())

    @property
    def directories(self) -> set[str]:
        """Those that the server may read again, relative to the artifact folder."""
        root = f"{self._folder.root}/"
        paths = [held.path for held in self._held.values()]
        paths += [self._path(order.adapter) for order in self._orders.values()]
        return {path.removeprefix(root) for path in paths if path.startswith(root)}

    # -- for those who need them ----------------------------------------------------------------------

    @asynccontextmanager
    async def using(self, adapter: rows.Adapter) -> AsyncIterator[str]:
        """The name by which the server has it, for as long as it is needed there. Raises BackendError if
        the server will not have it, Unsent if it fails."""
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

    async def load(self, adapter: rows.Adapter) -> None:
        """Returns once the server has it. Raises BackendError if it will not have it, ReplicaGone if it
        fails. Cancelled, it is loaded nevertheless, and taken out again if nobody needs it."""
        name = self._name(adapter)
        if self._has(name):
            self._held.move_to_end(name)
            await trio.lowlevel.checkpoint()
            return
        order = self._order(adapter)
        await order.done.wait()
        if order.error is not None:  # each who waits has one of his own
            raise type(order.error)(str(order.error))

    def lost(self, adapter: rows.Adapter) -> None:
        """The server has said that it does not have it."""
        name = self._name(adapter)
        if name != self._moving:
            self._held.pop(name, None)
            self._wake.set()

    def want(self) -> None:
        """Orders what a server should have before it gets requests. What servers have failed at waits
        until somebody asks for it."""
        self._exported = self._placements.exported
        for adapter in adapters.wanted(self._journal.ledger)[-self._most :]:
            name = self._name(adapter)
            if not self._has(name) and not self._failures.doubtful(name):
                self._order(adapter)

    def observe(self, there: Mapping[str, str], since: int) -> None:
        """What the server says that it has, asked for when `changes` was `since`: somebody may have loaded
        or unloaded behind our back, or an answer was lost."""
        missing = False
        for held in self._held.values():
            held.stuck = False
        if since == self.changes and self._moving is None:  # else any moment may be meant
            for name in [name for name in self._held if name not in there]:
                del self._held[name]
                missing = True
            for name, path in there.items():
                if name.startswith(self._prefix) and name not in self._held and name not in self._orders:
                    self._held[name] = _Held(path, None)
        if missing or self._exported != self._placements.exported:
            self.want()
        self._find_spare()
        self._wake.set()

    async def complete(self) -> None:
        """Returns once the server has what it should have before it gets requests. Raises ReplicaGone if
        it fails."""
        self.want()
        for order in list(self._orders.values()):
            await order.done.wait()
            if isinstance(order.error, ReplicaGone):
                raise ReplicaGone(str(order.error))
        await self.tidy()

    async def tidy(self) -> None:
        """Returns once what nobody needs any more was taken out, or could not be."""
        idle = self._idle
        self._find_spare()
        self._wake.set()
        await idle.wait()

    # -- the one who does it --------------------------------------------------------------------------

    async def run(self) -> None:
        """Loads and unloads, for ever. What goes wrong is told to whoever waits, and to `doubt`."""
        while True:
            self._wake = trio.Event()
            await self._journal_placements()
            if (stray := next(self._strays(), None)) is not None:
                await self._unload(stray)
            elif self._orders:
                await self._serve(*next(iter(self._orders.items())))
            elif self._spare:
                if self._is_idle(name := self._spare.pop()):
                    await self._unload(name)
            elif not self._wake.is_set():
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
            await self._journal_placements()
            order.error = None
        except ReplicaGone as error:
            order.error = error
            self._doubt(error)
        except BackendError as error:
            order.error = error
            log.error("adapter not loaded", url=url, adapter=adapter.adapter_id, reason=str(error))
            if self._is_journaled(adapter):
                self._refusals.append(placements.entry(adapter, url, "refused", str(error)))
        finally:
            del self._orders[name]
            order.done.set()

    async def _load(self, name: str, adapter: rows.Adapter) -> None:
        self._moving = name
        try:
            await self._client.load_adapter(name, self._path(adapter))
        except Unsent:
            raise
        except (ReplicaGone, trio.Cancelled):  # cancelled: the server is gone, maybe because of this
            self._failures.add(name, self._client.url)
            raise
        finally:
            self._moving = None
            self.changes += 1
        self._failures.forget(name, self._client.url)
        self._held[name] = _Held(self._path(adapter), adapter)

    async def _make_room(self) -> None:
        """For one more: takes out those that nobody has used for longest, and never one in use."""
        for name in list(self._held):
            if len(self._held) < self._most:
                return
            if self._is_idle(name) and not await self._unload(name):
                return  # rather one too many

    async def _unload(self, name: str) -> bool:
        held = self._held[name]
        self._moving = name
        try:
            await self._client.unload_adapter(name)
        except BackendError as error:
            held.stuck = True
            if not held.told:
                log.warning("adapter not unloaded", url=self._client.url, name=name, reason=str(error))
                held.told = True
            if isinstance(error, ReplicaGone):
                for other in self._held.values():
                    other.stuck = True  # each would wait as long
                self._spare.clear()
                self._doubt(error)
            return False
        finally:
            self._moving = None
            self.changes += 1
        self._held.pop(name, None)
        return True

    def _strays(self) -> Iterator[str]:
        return (name for name, held in self._held.items() if held.adapter is None and not held.stuck)

    def _find_spare(self) -> None:
        """Those to be taken out: nobody will sample from them any more, or they are too many."""
        needed = adapters.needed(self._journal.ledger)
        kept = [
            name
            for name, held in self._held.items()
            if held.adapter and held.adapter.adapter_id in needed and self._is_journaled(held.adapter)
        ]
        leaving = {name for name, held in self._held.items() if held.adapter} - set(kept)
        leaving.update(kept[: max(0, len(kept) - self._most)])
        self._spare = [name for name in self._held if name in leaving and not self._held[name].stuck]

    def _is_idle(self, name: str) -> bool:
        """Whether nobody uses it, and no job is about to give it to the world."""
        held = self._held.get(name)
        if held is None or self._using[name]:
            return False
        if held.adapter is None or self._is_journaled(held.adapter):
            return True
        job = self._journal.ledger.jobs.get((held.adapter.job_id,))
        return job is None or job.state not in rows.OPEN

    def _is_journaled(self, adapter: rows.Adapter) -> bool:
        """The job that it was placed for may not have ended yet, or have failed."""
        row = self._row(adapter)
        return row is not None and row.directory == adapter.directory

    def _was_given_up(self, adapter: rows.Adapter) -> bool:
        """Whether the journal has another one by its id: the job that it was placed for has failed."""
        row = self._row(adapter)
        return row is not None and row.directory != adapter.directory

    def _row(self, adapter: rows.Adapter) -> rows.Adapter | None:
        return self._journal.ledger.adapters.get((adapter.adapter_id,))

    async def _journal_placements(self) -> None:
        """What the journal says of this server becomes what is so."""
        url = self._client.url
        entries, self._refusals = self._refusals, []
        told = self._placements.of(url)
        has = {
            held.adapter.adapter_id: held.adapter
            for held in self._held.values()
            if held.adapter and not self._was_given_up(held.adapter)
        }
        entries += [placements.gone(subject) for key, subject in told.items() if key not in has]
        entries += [
            placements.entry(adapter, url, "loaded")
            for key, adapter in has.items()
            if key not in told and self._is_journaled(adapter)
        ]
        if entries:
            await self._journal.append(*entries)

    def _has(self, name: str) -> bool:
        held = self._held.get(name)
        return held is not None and held.adapter is not None and name != self._moving

    def _order(self, adapter: rows.Adapter) -> _Order:
        order = self._orders.setdefault(self._name(adapter), _Order(adapter))
        self._wake.set()
        return order

    @property
    def _prefix(self) -> str:
        return adapters.prefix(self._journal.home_id)

    def _name(self, adapter: rows.Adapter) -> str:
        return adapters.served_name(self._journal.home_id, adapter)

    def _path(self, adapter: rows.Adapter) -> str:
        return str(self._folder.root / adapter.directory)
