"""The worker of a soak, in a process of its own with its clients: the real one from Router to journal,
without its HTTP side.

    python -m tests.soak.worker OPTIONS      (as JSON)

It says `Opened`; then it does as it is told on its standard input, and answers each line with a line of
JSON, a `Done`: a number has so many jobs done. The end of the input ends all sessions, and after one more
`Done` the worker.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

import msgspec
import trio

from tests.null_servers import DirectEndpoint, Ports
from tests.soak import mutants
from tests.soak.clients import Clients
from tink.actors import lanes, retention
from tink.actors.router import Router
from tink.actors.trainer_samples import TrainerSamples
from tink.actors.worker import open_worker
from tink.backends.endpoint import Endpoint
from tink.domain import retention as policy
from tink.home import Home
from tink.journal.journal import Journal
from tink.logs import configure_logs, write_line
from tink.settings import Settings
from tink.world import World

# Operations, and samples, that the servers have at once.
SLOTS = 64


class Options(msgspec.Struct, kw_only=True):
    """`ports`: of the servers, None for one without HTTP. `kept`: seconds of retention. `mutant`: what is
    put into the worker for the soak to find."""

    home: str
    seed: int
    at_once: int
    kept: float
    ports: Ports | None = None
    mutant: str | None = None


class Clock(World):
    """The real world, in which no time passes while the worker has nothing to do but wait for its next
    order: what others do then must not make anything old."""

    def __init__(self) -> None:
        self._waited = 0.0
        self._since: float | None = None
        self._epoch = super().now() - super().monotonic()

    def monotonic(self) -> float:
        return (super().monotonic() if self._since is None else self._since) - self._waited

    def now(self) -> float:
        return self._epoch + self.monotonic()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        self._since = super().monotonic()
        try:
            yield
        finally:
            since, self._since = self._since, None
            self._waited += super().monotonic() - since


class Opened(msgspec.Struct):
    """`seconds`: what it took to open the journal."""

    seconds: float


class Done(msgspec.Struct, kw_only=True):
    """`jobs`, `sessions`: since the worker began. `accepted`, `ended`: of the jobs of this line, p50 and
    p99 in milliseconds. `rows`: how many are in memory, by table; `lanes` are the Router's."""

    jobs: int
    sessions: int
    accepted: tuple[float, float]
    ended: tuple[float, float]
    rows: dict[str, int]


def settings(options: Options) -> Settings:
    """Training on HuggingFace, and sampling there too, or on vLLM where there is HTTP."""
    shared: dict[str, Any] = {"home": Path(options.home), "max_workers": SLOTS}
    shared["retention_hours"] = options.kept / 3600
    if options.ports is None:
        return Settings(**shared)
    return Settings(**shared, use_hf="true", use_vllm=True, vllm_base_url=_url(options.ports.vllm))


def endpoint(options: Options, home: Home) -> Endpoint:
    if options.ports is None:
        return DirectEndpoint(str(home.artifacts))
    return Endpoint(_url(options.ports.trainer))


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def hurry(kept: float) -> None:
    """The worker's own times become as short as what it keeps."""
    for module, name, seconds in (
        (retention, "RETENTION_SECONDS", kept / 30),
        (retention, "EXPIRY_SECONDS", kept / 300),
        (policy, "LEAST_KEPT_SECONDS", kept / 30),
        (lanes, "FORGET_SECONDS", kept / 30),
    ):
        assert hasattr(module, name), "it has moved"
        setattr(module, name, seconds)


async def serve(options: Options) -> None:
    home, world = Home(Path(options.home)), Clock()
    home.make()
    hurry(options.kept)
    TrainerSamples.slots = SLOTS
    trainer = endpoint(options, home)

    async def find(unfit: str | None) -> Endpoint:
        await trio.lowlevel.checkpoint()
        assert unfit is None, f"the training server {unfit} is not used any more"
        return trainer

    began = world.monotonic()
    async with Journal.open(home, world, version="soak", settings_digest="soak") as journal:
        tell(Opened(world.monotonic() - began))
        async with open_worker(journal, find, settings(options), world) as worker:
            if options.mutant is not None:
                mutants.ALL[options.mutant](journal)
            await work(options, journal, worker, world)


async def work(options: Options, journal: Journal, worker: Router, world: Clock) -> None:
    ttl = max(5, round(options.kept))
    clients = Clients(worker.ask, world, seed=options.seed, at_once=options.at_once, ttl=ttl)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(clients.run)
        while line := await order(world):
            await clients.work(int(line))
            tell(done(clients, journal, worker))
        clients.end()
    tell(done(clients, journal, worker))


async def order(world: Clock) -> str:
    with world.stopped():
        return await trio.to_thread.run_sync(sys.stdin.readline)


def done(clients: Clients, journal: Journal, worker: Router) -> Done:
    rows = {name: len(table) for name, table in journal.ledger.tables.items()}
    return Done(
        jobs=clients.jobs,
        sessions=clients.sessions,
        accepted=middle_and_tail(clients.accepted),
        ended=middle_and_tail(clients.ended),
        rows=rows | {"lanes": len(worker.lanes)},
    )


def middle_and_tail(seconds: Sequence[float]) -> tuple[float, float]:
    if len(seconds) < 2:
        return 0.0, 0.0
    cuts = quantiles(seconds, n=100)
    return cuts[49] * 1000, cuts[98] * 1000


def tell(what: Opened | Done) -> None:
    write_line(msgspec.json.encode(what).decode(), sys.stdout)


if __name__ == "__main__":
    configure_logs("warning")
    trio.run(serve, msgspec.json.decode(sys.argv[1], type=Options))
