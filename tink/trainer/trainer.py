"""The training server without its HTTP side: the engine, once it is built, with its lanes and samples.

Engines are built in a thread (`Trainer.load`), and everything that computes runs in threads, so health
is answered at once whatever goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import structlog
import trio

from tink.trainer.books import Books
from tink.trainer.engines.interface import Engine, Facts
from tink.trainer.lanes import Lanes
from tink.trainer.samples import Samples
from tink.trainer.text_generation import TextGeneration
from tink.wire.tink_train import PROTOCOL, Health, Info
from tink.world import World

log = structlog.get_logger("tink.trainer")


@dataclass(frozen=True)
class Serving:
    """What there is once the engine has been built."""

    facts: Facts
    lanes: Lanes
    samples: Samples
    texts: TextGeneration


class Trainer:
    """What the routes serve. `slots`: how many models may compute at once on a CPU. `nursery` owns the
    work."""

    def __init__(self, world: World, slots: int, nursery: trio.Nursery) -> None:
        self.incarnation = world.new_id()
        self.books = Books(self.incarnation)
        self.called_at = world.monotonic()
        self._world = world
        self._slots = slots
        self._nursery = nursery
        self._broken: str | None = None
        self._serving: Serving | None = None

    async def load(self, build: Callable[[], Engine]) -> None:
        """Builds the engine. If that fails, health says why, for as long as the process is left."""
        try:
            engine = await self._world.run_sync(build)
        except Exception as error:
            log.exception("the engine could not be built")
            self._broken = f"{type(error).__name__}: {error}"
            return
        # A GPU has room for the activations of one model, and is no faster with two.
        if engine.facts.versions.get("device", "cpu") != "cpu":
            self._slots = 1
        samples = Samples(self._world, engine, self.books.refused, self._nursery)
        self._serving = Serving(
            engine.facts,
            Lanes(self._world, engine, self.books, self._slots, self._nursery),
            samples,
            TextGeneration(self._world, samples, engine.facts),
        )
        log.info("ready", base_model=engine.facts.base_model, incarnation=self.incarnation)

    def touch(self) -> None:
        """A worker has called."""
        self.called_at = self._world.monotonic()

    async def finish(self) -> None:
        """Lets what runs end; what is queued stays queued. Returns when no operation computes."""
        if self._serving:
            await self._serving.lanes.finish()
            await self._serving.samples.finish()

    @property
    def health(self) -> Health:
        if self._broken is not None:
            return Health(PROTOCOL, self.incarnation, "broken", self._broken)
        if self._serving is None:
            return Health(PROTOCOL, self.incarnation, "loading")
        running = [*self._serving.lanes.running(), *self._serving.samples.running()]
        return Health(PROTOCOL, self.incarnation, "ready", running=running)

    @property
    def serving(self) -> Serving:
        """Raises Refused while there is nothing to serve."""
        if self._broken is not None:
            raise self.books.refused(503, "broken", self._broken)
        if self._serving is None:
            raise self.books.refused(503, "loading", "the model is being loaded", retryable=True)
        return self._serving

    @property
    def info(self) -> Info:
        return Info(PROTOCOL, self.incarnation, **asdict(self.serving.facts), slots=self._slots)

    @property
    def lanes(self) -> Lanes:
        return self.serving.lanes

    @property
    def samples(self) -> Samples:
        return self.serving.samples
