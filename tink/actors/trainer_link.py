"""The link to the training server: is one there, which life of it is this, and what has it applied.

The actors that send it work hold a `Life` and give it up when a call fails; `life()` waits until the
server answers again, as the same incarnation or as a new one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import structlog
import trio

from tink.backends.trainer import Refused, TrainerClient, TrainerGone
from tink.domain import rows
from tink.domain.events import Subject, TrainerStarted
from tink.errors import StartupError
from tink.journal.journal import Journal
from tink.trainer import protocol
from tink.world import World

# Between two looks at a healthy server; they also tell it that its worker lives.
BEAT_SECONDS = 2.0
# Between two looks at one that does not answer (yet).
RETRY_SECONDS = 0.2

log = structlog.get_logger()


@dataclass(frozen=True)
class Endpoint:
    url: str
    token: str = ""


# Makes sure that a server runs, and says where: an embedded one is started, or adopted from the worker
# before this one.
Find = Callable[[], Awaitable[Endpoint]]


@dataclass
class Life:
    """One incarnation of the server. `applied`: model -> last op_no, for the models that it holds."""

    client: TrainerClient
    info: protocol.Info
    lease: int
    applied: dict[str, int] = field(default_factory=dict)

    @property
    def incarnation(self) -> str:
        return self.info.incarnation


class TrainerLink:
    """An actor: `run()` keeps the link, everything else reads it."""

    def __init__(self, find: Find, journal: Journal, world: World, *, slots: int) -> None:
        self._find, self._journal, self._world, self._slots = find, journal, world, slots
        self._life: Life | None = None
        self._arrived = trio.Event()
        self._arrived_once = False
        self._look = trio.Event()
        # What the journal says of the last server, if models of its are there: they bind the home to it.
        self._served = journal.last_trainer
        self._exposures = trio.Condition()
        self._exposed, self._alone = 0, False

    async def life(self) -> Life:
        """The server's present life; waits for one as long as it takes."""
        await trio.lowlevel.checkpoint()
        while self._life is None:
            await self._arrived.wait()
        return self._life

    async def served(self) -> TrainerStarted:
        """What the server serves, as far as is known: a server that is away for a while comes back with
        the same. Waits only if there never was one."""
        await trio.lowlevel.checkpoint()
        while self._served is None:
            await self.life()
        return self._served

    def is_new(self, life: Life) -> bool:
        """Whether it began after this worker: what a former one was running did not survive in it."""
        before = self._journal.last_trainer
        return before is None or before.incarnation != life.incarnation

    @asynccontextmanager
    async def exposure(self, *, alone: bool) -> AsyncIterator[None]:
        """Around a call that may be the server's death. `alone`: no other call is out meanwhile."""
        async with self._exposures:
            while self._alone or (alone and self._exposed):
                await self._exposures.wait()
            self._alone = alone
            self._exposed += 1
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                async with self._exposures:
                    self._exposed -= 1
                    self._alone = False
                    self._exposures.notify_all()

    def lost(self, life: Life) -> None:
        """A call of this life failed: no more of it until the server has answered again."""
        if self._life is life:
            self._life = None
            self._arrived = trio.Event()
            self._look.set()

    @property
    def present(self) -> Life | None:
        """The life of now, if there is one."""
        return self._life

    async def run(self) -> None:
        """Keeps the link for ever. StartupError if the first server cannot be had at all: then it is the
        configuration; a later one is tried again and again."""
        while True:
            try:
                endpoint = await self._find()
                async with TrainerClient.connect(
                    endpoint.url, self._world, slots=self._slots, token=endpoint.token
                ) as client:
                    await self._keep(client)
            except (TrainerGone, Refused, StartupError) as error:
                if isinstance(error, StartupError) and not self._arrived_once:
                    raise
                log.warning("trainer lost", reason=str(error))
            finally:
                if self._life is not None:
                    self.lost(self._life)
            await trio.sleep(RETRY_SECONDS)

    async def _keep(self, client: TrainerClient) -> None:
        """Follows one server until a call fails (TrainerGone)."""
        known: str | None = None
        while True:
            self._look = trio.Event()
            health = await client.health()
            if health.protocol != protocol.PROTOCOL:
                raise StartupError(
                    f"the trainer at {client.url} speaks {health.protocol}, not {protocol.PROTOCOL}"
                )
            if health.state == "broken":
                raise StartupError(f"the trainer at {client.url} is broken: {health.detail}")
            if health.state == "loading":
                await trio.sleep(RETRY_SECONDS)
                continue
            if known is not None and known != health.incarnation:
                raise TrainerGone(f"the trainer at {client.url} was restarted")
            known = health.incarnation
            if self._life is None:
                self._life = await self._begin(client)
                self._arrived_once = True
                self._arrived.set()
            with trio.move_on_after(BEAT_SECONDS):
                await self._look.wait()

    async def _begin(self, client: TrainerClient) -> Life:
        try:
            info, state = await client.info(), await client.state()
        except Refused as error:
            raise TrainerGone(str(error)) from error
        self._check_base(info)
        life = Life(
            client=client,
            info=info,
            lease=self._journal.incarnation,
            applied={model: held.applied for model, held in state.models.items()},
        )
        started = TrainerStarted(
            incarnation=info.incarnation,
            engine=info.engine,
            base_model=info.base_model,
            base_digest=info.base_digest,
            arch=info.arch,
            max_context=info.max_context,
            base_path=info.base_path,
        )
        if started != self._served:
            await self._journal.append((Subject(replica="trainer"), started))
            self._served = started
        log.info(
            "trainer ready",
            url=client.url,
            engine=info.engine,
            model=info.base_model,
            holds=len(state.models),
        )
        return life

    def _check_base(self, info: protocol.Info) -> None:
        """A home's models live on one base: their redo on another one would be another run."""
        before = self._served
        models = self._journal.ledger.table("models", rows.Model).values()
        if before is None or before.base_digest == info.base_digest or not any(m.rank for m in models):
            return
        raise StartupError(
            f"the models of this home were made on {before.base_model} ({before.base_digest[:12]}), and "
            f"the trainer serves {info.base_model} ({info.base_digest[:12]}): serve the former, or use "
            "another --home"
        )
