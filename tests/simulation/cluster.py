"""A worker and its trainer on one simulated machine, to be crashed and started again."""

from __future__ import annotations

import functools
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import httpx
import msgspec
import trio

from tests.simulation.doubles import Died, Nature, Network, SimulatedTrainer, SimulatedWorld, work
from tests.simulation.power import Image, Storage
from tests.simulation.watch import Watch
from tink.actors.router import Router
from tink.actors.worker import open_worker
from tink.domain import ids, keys, messages
from tink.domain.requests import OpName
from tink.errors import JournalUnavailable, Overloaded, tink_error
from tink.home import Home
from tink.journal import store
from tink.journal.journal import Journal, prepare
from tink.journal.sqlite import reader_engine
from tink.settings import Settings

T = TypeVar("T")

TENANT = "default"
# How long a client waits for one answer, and before it asks again.
PATIENCE_SECONDS, RETRY_SECONDS = 30.0, 0.5


class Server(Protocol):
    """A sampling server's double."""

    def transport(self) -> httpx.AsyncBaseTransport: ...


class NoAnswer(Exception):
    """Whether the question was taken is not known."""


class WorkerWorld(SimulatedWorld):
    """`settled`: it serves, or it is dead. `ended`: it is dead."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster.nature, cluster.network)
        self._cluster = cluster
        self.journal: Journal | None = None
        self.scope = trio.CancelScope()
        self.settled, self.ended = trio.Event(), trio.Event()

    def perform(self, fn: Callable[..., T], *args: Any) -> T:
        return self._cluster.perform(self, fn, *args)

    def http_transport(self, origin: str, max_slots: int) -> httpx.AsyncBaseTransport:
        server = self._cluster.vllm.get(origin)
        return super().http_transport(origin, max_slots) if server is None else server.transport()


Meets = Literal["power", "full before", "full after"]


class Ambush:
    """What the next commit meets. `power`: a cut while it is being written. `full before`, `full after`: it
    raises, when nothing of it has been written yet, or all. `sprung` when it has happened."""

    def __init__(self, kind: Meets) -> None:
        self.kind = kind
        self.sprung = trio.Event()


class Cluster:
    """`ambush`: a fault that waits for the next commit. `vllm`: servers that sample, by their URL; without
    them the trainer does."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        *,
        loss: float = 0.0,
        duplicates: float = 0.0,
        slow: float = 0.0,
        jump: float = 0.0,
        vllm: Sequence[Server] = (),
        **settings: Any,
    ) -> None:
        self.vllm = {f"http://vllm-{number}:8000": server for number, server in enumerate(vllm)}
        if vllm:
            settings = {"use_hf": "true", "use_vllm": True, "vllm_base_url": ",".join(self.vllm)} | settings
        self.settings = Settings(home=folder, **settings)
        self.nature = Nature(seed, slow=slow, jump=jump)
        self.rng = self.nature.rng
        self.home = Home(folder)
        self.home.make()
        if not self.home.journal.exists():
            for name, content in _empty_databases().items():
                (folder / name).write_bytes(content)
        self.network = Network(self.nature, loss=loss, duplicates=duplicates)
        artifacts = self.settings.artifact_root
        self.watch = Watch(self.home, artifacts, self.nature.counts)
        slots = self.settings.training_slots
        self.trainer = SimulatedTrainer(self.nature, self.network, artifacts, self.watch, slots)
        self.ambush: Ambush | None = None
        self.router: Router | None = None
        self.journal: Journal | None = None
        self._storages = (self.watch.journal, self.watch.bodies)
        self._disk_is_full = False
        self._world: WorkerWorld | None = None
        self._serving = trio.Event()
        self._calls: set[trio.CancelScope] = set()

    @classmethod
    @asynccontextmanager
    async def running(cls, folder: Path, seed: int = 0, **options: Any) -> AsyncIterator[Cluster]:
        """Started, with the options of `Cluster` and any settings. Ends with what the watch has found."""
        cluster = cls(folder, seed, **options)
        async with trio.open_nursery() as nursery:
            cluster._nursery = cluster.trainer.supervisor = nursery
            nursery.start_soon(cluster._end_when_broken)
            await cluster.start_trainer()
            await cluster.start_worker()
            yield cluster
            cluster.crash_worker()
            cluster.trainer.kill()
            nursery.cancel_scope.cancel()
        cluster.watch.settle()

    async def _end_when_broken(self) -> None:
        await self.watch.broken.wait()
        self.watch.settle()

    # -- processes ----------------------------------------------------------------------------------

    async def start_trainer(self) -> None:
        """Returns when it listens, or has died before that. Nothing to do if there is one."""
        if not self.trainer.alive:
            self._nursery.start_soon(self.trainer.run, self.trainer.begin())
        await self.trainer.settled()

    async def start_worker(self) -> None:
        """Returns when it serves, or has died before that. Nothing to do if there is one."""
        world = self._world
        if world is None or world.dead:
            world = self._world = WorkerWorld(self)
            self._disk_is_full = False
            self._nursery.start_soon(self._run_worker, world)
        await world.settled.wait()

    @property
    def world(self) -> WorkerWorld:
        """The present worker's."""
        assert self._world is not None
        return self._world

    async def worker_ended(self) -> None:
        """The present one, if there is one."""
        if self._world is not None:
            await self._world.ended.wait()

    async def _run_worker(self, world: WorkerWorld) -> None:
        try:
            with world.scope:
                async with (
                    Journal.open(self.home, world, version="sim", settings_digest="sim") as journal,
                    open_worker(journal, self.trainer.find, self.settings, world) as router,
                ):
                    await trio.lowlevel.checkpoint_if_cancelled()
                    self.router, self.journal = router, journal
                    self._serving.set()
                    world.settled.set()
                    await trio.sleep_forever()
        except BaseException as error:
            # A dead process tells nobody why.
            if not world.dead and not self._has_stopped_as_it_must(error):
                raise
        else:
            assert world.dead, "the worker ended by itself"

    def _has_stopped_as_it_must(self, error: BaseException) -> bool:
        """A commit has failed."""
        if not self._disk_is_full or not isinstance(tink_error(error), JournalUnavailable):
            return False
        self.crash_worker()
        return True

    def crash_worker(self) -> None:
        """Between two of its steps: what it has not committed never was."""
        world = self._world
        if world is None or world.dead:
            return
        world.die()
        self.router = self.journal = None
        if self._serving.is_set():
            self._serving = trio.Event()
        for call in list(self._calls):
            call.cancel()
        # The kernel closes a dead process's files as they are; a living one would tidy them up.
        images = {storage: Image.read(storage.path) for storage in self._storages}
        self.watch.closed()
        if world.journal is not None:
            world.journal._close()
        for storage, image in images.items():
            image.write(storage.path)
        world.scope.cancel()
        world.settled.set()
        world.ended.set()

    def cut_power(self, before: Mapping[Storage, Image] | None = None) -> None:
        """Both processes end, and of the files there is left what a power cut leaves. `before`: the files
        before the commit that it comes into."""
        left = {s: s.after_power_cut(self.rng, (before or {}).get(s)) for s in self._storages}
        self.nature.counts["power cuts"] += 1
        self.trainer.kill()
        self.crash_worker()
        self.watch.power_was_cut()
        for storage, image in left.items():
            storage.power_is_back(image)

    def perform(self, world: WorkerWorld, fn: Callable[..., T], *args: Any) -> T:
        """What the worker does in a thread, and what may happen to it there."""
        ambush = self.ambush if work(fn) == "commit" else None
        if ambush is None:
            result = fn(*args)
            if isinstance(result, Journal):
                world.journal = result
                self.watch.opened(result)
            self.watch.looked()
            return result
        self.ambush = None
        ambush.sprung.set()
        self.nature.counts[f"commits that met: {ambush.kind}"] += 1
        before = {storage: Image.read(storage.path) for storage in self._storages}
        if ambush.kind != "full before":
            fn(*args)
        if ambush.kind == "power":
            self.cut_power(before)
            raise Died
        self.watch.looked()
        self._disk_is_full = True
        raise JournalUnavailable("database or disk is full")

    # -- a client -----------------------------------------------------------------------------------

    async def ask(self, question: messages.Question) -> Any:
        """Asks as the SDK does: a worker that is gone, or says 429 or 503, is asked again."""
        while True:
            await self._serving.wait()
            try:
                return await self.ask_once(question)
            except NoAnswer:
                await trio.sleep(RETRY_SECONDS)

    async def ask_once(self, question: messages.Question) -> Any:
        """Raises what the worker says is wrong, and NoAnswer if there is no answer."""
        router = self.router
        with trio.move_on_after(PATIENCE_SECONDS) as call:
            self._calls.add(call)
            try:
                if router is not None:
                    answer = await router.ask(question)
            except Exception as error:
                alive = router is self.router
                if alive and not isinstance(error, Overloaded | JournalUnavailable | Died):
                    raise
            else:
                if router is not None and router is self.router:
                    self.watch.answered(question, answer)
                    return answer
            finally:
                self._calls.discard(call)
        raise NoAnswer

    async def router_ask(self, question: messages.Question) -> Any:
        """One try; errors are raised."""
        assert self.router is not None
        return await self.router.ask(question)

    async def keep_trainer_alive(self) -> None:
        """What a supervisor does."""
        while True:
            await self.start_trainer()
            await trio.sleep(1.0)

    async def session(self, tenant: str = TENANT) -> str:
        created: messages.Created = await self.ask(
            messages.CreateSession(tenant, idempotency_key=f"key-{self.rng.getrandbits(64)}")
        )
        return created.id

    async def submit(
        self,
        model_id: str,
        seq: int | None,
        op: OpName,
        body: bytes = b"",
        *,
        tenant: str = TENANT,
        key: str | None = None,
    ) -> messages.Promise:
        session_id = model_id.partition(":")[0]
        promise: messages.Promise = await self.ask(
            messages.SubmitTraining(
                tenant, op=op, session_id=session_id, model_id=model_id, seq_id=seq, body=body, key=key
            )
        )
        return promise

    async def unload(self, model_id: str) -> messages.Promise:
        body = msgspec.json.encode({"model_id": model_id})
        return await self.submit(model_id, None, "unload_model", body, key=keys.UNLOAD)

    async def create(self, session_id: str, number: int = 0, *, tenant: str = TENANT, **config: Any) -> str:
        model_id = ids.model_id(session_id, number)
        body = {
            "session_id": session_id,
            "model_seq_id": number,
            "base_model": "sim/model",
            "lora_config": {"rank": 4, "seed": number, **config},
        }
        await self.ask(
            messages.SubmitTraining(
                tenant,
                op="create_model",
                session_id=session_id,
                model_id=model_id,
                seq_id=0,
                model_seq_id=number,
                body=msgspec.json.encode(body),
            )
        )
        return model_id

    async def outcome(self, job_id: str, *, tenant: str = TENANT) -> messages.Outcome:
        outcome: messages.Outcome = await self.ask(messages.AwaitOutcome(tenant, job_id))
        return outcome

    # -- what must hold -----------------------------------------------------------------------------

    def check_journal(self) -> None:
        """All that the watch has seen, and what `tink db check` would say."""
        self.watch.settle()
        engine = reader_engine(self.home.journal)
        with engine.connect() as connection:
            assert store.check(connection) == []
        engine.dispose()


def stored_bodies(home: Home) -> dict[str, int]:
    """Their names, with their sizes."""
    found: dict[str, int] = {}
    for path, table in ((home.journal, "short_bodies"), (home.bodies, "bodies")):
        with closing(sqlite3.connect(path)) as connection:
            found |= dict(connection.execute(f"SELECT sha256, size FROM {table}"))
    return found


@functools.cache
def _empty_databases() -> dict[str, bytes]:
    """Migrated: every start of a worker looks at that again, but making them takes longest."""
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder))
        prepare(home)
        return {path.name: path.read_bytes() for path in (home.journal, home.bodies)}
