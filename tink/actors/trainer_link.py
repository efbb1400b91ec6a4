"""Keeps the link to the training server: looks whether one is there, begins a life with it, and has it
replaced when it hangs or contradicts the journal."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

import structlog
import trio

from tink.actors.backoff import Backoff
from tink.actors.exposures import Exposures
from tink.actors.link import Life, Link
from tink.backends.endpoint import Endpoint
from tink.backends.trainer import TrainerClient, TrainerGone, TrainerRefused
from tink.domain.events import Subject, TrainerStarted
from tink.errors import StartupError
from tink.journal.journal import Journal
from tink.limits import BEAT_SECONDS, IDLE_SECONDS, LOADING_SECONDS, WRONG_ANSWERS
from tink.wire import tink_train
from tink.world import World

log = structlog.get_logger()


# Makes sure that a server runs, and says where: an embedded one is started, or adopted from the worker
# before this one. The one of the incarnation that it is called with is unfit: another must take its place.
Find = Callable[[str | None], Awaitable[Endpoint]]


class TrainerLink(Link):
    """An actor: `run()` keeps the link, everything else reads it."""

    def __init__(
        self, find: Find, journal: Journal, world: World, *, slots: int, hang_seconds: float
    ) -> None:
        """`hang_seconds`: an operation without progress for so long is taken for hung; 0: none is."""
        # What the journal says of the last server, if models of its are there: they bind the home to it.
        super().__init__(journal.last_trainer)
        self._find, self._journal, self._world, self._slots = find, journal, world, slots
        self._hang_seconds = hang_seconds
        self._arrived_once = False
        self._last: Life | None = None
        self._look = trio.Event()
        self._backoff = Backoff()
        self._unfit: str | None = None
        self._why_unfit = ""
        self._failures = 0  # to begin a life, in a row
        self._idle: set[str] = set()  # jobs whose operations were told of
        self._exposures = Exposures()

    def is_new(self, life: Life) -> bool:
        before = self._journal.last_trainer
        return before is None or before.incarnation != life.incarnation

    def exposure(self, *, alone: bool) -> AbstractAsyncContextManager[None]:
        return self._exposures.one(alone=alone)

    def lost(self, life: Life) -> None:
        if self._life is life:
            self._life = None
            self._arrived = trio.Event()
            self._look.set()

    def replace(self, life: Life, reason: str) -> None:
        if self._life is not None and self._life.incarnation == life.incarnation:
            self._condemn(life.incarnation, reason)
            self.lost(self._life)

    async def run(self) -> None:
        """Keeps the link for ever. StartupError if the first server cannot be had at all: then it is the
        configuration; a later one is tried again and again."""
        while True:
            try:
                endpoint = await self._find(self._unfit)
                async with endpoint.connect(self._world, self._slots) as client:
                    await self._keep(client)
            except (TrainerGone, TrainerRefused, StartupError) as error:
                if isinstance(error, StartupError) and not self._arrived_once:
                    raise
                self._tell(str(error))
            finally:
                if self._life is not None:
                    self.lost(self._life)
            await self._backoff.pause()

    def _tell(self, reason: str) -> None:
        """Once, and not at every look."""
        if reason != self._told:
            self._told = reason
            log.warning("trainer lost", reason=reason)

    def _condemn(self, incarnation: str, reason: str) -> None:
        self._unfit, self._why_unfit = incarnation, reason
        log.error("trainer is replaced", reason=reason)

    async def _keep(self, client: TrainerClient) -> None:
        """Follows one server until a call fails (TrainerGone)."""
        known: str | None = None
        while True:
            self._look = trio.Event()
            health = await client.health()
            if health.protocol != tink_train.PROTOCOL:
                raise StartupError(
                    f"the trainer at {client.url} speaks {health.protocol}, not {tink_train.PROTOCOL}"
                )
            if health.state == "broken":
                raise StartupError(f"the trainer at {client.url} is broken: {health.detail}")
            if health.incarnation == self._unfit:
                raise TrainerGone(
                    f"the trainer at {client.url} is not used any more, another must take its place: "
                    f"{self._why_unfit}"
                )
            if known is not None and known != health.incarnation:
                raise TrainerGone(f"the trainer at {client.url} was restarted")
            known = health.incarnation
            if health.state == "loading":
                await trio.sleep(LOADING_SECONDS)
                continue
            self._watch(client, health)
            if self._life is None:
                self._life = await self._begin(client, health.incarnation)
                self._arrived_once = True
                self._arrived.set()
            with trio.move_on_after(BEAT_SECONDS):
                await self._look.wait()

    def _watch(self, client: TrainerClient, health: tink_train.Health) -> None:
        """Health is answered beside the work: that work goes on is told by its progress alone. Raises
        TrainerGone for a server whose work hangs."""
        for work in health.running:
            if 0 < self._hang_seconds < work.idle:
                hung = f"{work.job_id} has made no progress for {work.idle:.0f} s"
                self._condemn(health.incarnation, f"{hung} (TINK_HANG_SECONDS={self._hang_seconds:g})")
                raise TrainerGone(f"the trainer at {client.url} hangs: {hung}")
            if work.idle > IDLE_SECONDS and work.job_id not in self._idle:
                log.warning("no progress", job=work.job_id, seconds=round(work.idle))
                self._idle.add(work.job_id)
        self._idle &= {work.job_id for work in health.running if work.idle > IDLE_SECONDS}

    async def _begin(self, client: TrainerClient, incarnation: str) -> Life:
        try:
            info, state = await client.info(), await client.state()
            self._check_state(client, incarnation, info, state)
        except (TrainerGone, TrainerRefused) as error:
            self._failures += 1
            if self._failures >= WRONG_ANSWERS:
                self._failures = 0
                self._condemn(incarnation, f"its health is well, and nothing else: {error}")
            raise TrainerGone(str(error)) from error
        self._check_base(info)
        # Calls that are still out by the link before write down what they apply, too.
        last = self._last
        applied = last.applied if last is not None and last.incarnation == incarnation else {}
        applied.clear()
        applied.update((model, held.applied) for model, held in state.models.items())
        life = self._last = Life(
            client=client,
            info=info,
            lease=self._journal.incarnation,
            applied=applied,
        )
        started = TrainerStarted.of(info)
        again = started == self._served and self._arrived_once and self._told is None
        if started != self._served:
            self._warn_of_versions(info)
            await self._journal.append((Subject(replica="trainer"), started))
            self._served = started
        if not again:
            log.info(
                "trainer ready",
                url=client.url,
                engine=info.engine,
                model=info.base_model,
                holds=len(state.models),
            )
        self._told, self._failures = None, 0
        self._backoff.reset()
        return life

    def _check_state(
        self, client: TrainerClient, incarnation: str, info: tink_train.Info, state: tink_train.State
    ) -> None:
        """What it says of itself must be of one server, and no other history than the journal's: a journal
        that was restored from a backup is behind a trainer that went on. Raises TrainerGone."""
        if not info.incarnation == state.incarnation == incarnation:
            raise TrainerGone(f"the trainer at {client.url} answers for several")
        wrong = None
        if state.lease > self._journal.incarnation:
            wrong = f"it has served worker {state.lease}, this one is {self._journal.incarnation}"
        for model in self._journal.ledger.models.values():
            held = state.models.get(model.model_id)
            if held is not None and held.applied > model.op_no:
                wrong = (
                    f"it has applied op {held.applied} of {model.model_id}, the journal has {model.op_no}"
                )
        if wrong is not None:
            self._condemn(incarnation, f"it is ahead of the journal: {wrong}")
            raise TrainerGone(f"the trainer at {client.url} is ahead of the journal")

    def _warn_of_versions(self, info: tink_train.Info) -> None:
        """What a redo gives may differ in its last bits from what was journaled; where it does, that is
        journaled too."""
        before = self._served
        if before is None or not before.versions or before.versions == info.versions:
            return
        now, then = dict(info.versions), before.versions
        changed = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
        log.warning(
            "trainer has other versions than before",
            **{name: f"{then.get(name)} -> {now.get(name)}" for name in changed},
        )

    def _check_base(self, info: tink_train.Info) -> None:
        """A home's models live on one base: their redo on another one would be another run."""
        before = self._served
        models = self._journal.ledger.models.values()
        if before is None or before.base_digest == info.base_digest or not any(m.rank for m in models):
            return
        raise StartupError(
            f"the models of this home were made on {before.base_model} ({before.base_digest[:12]}), and "
            f"the trainer serves {info.base_model} ({info.base_digest[:12]}): serve the former, or use "
            "another --home"
        )
