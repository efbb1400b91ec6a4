"""A worker and its trainer in one simulated world, to be crashed and started again."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import trio

from tests.simulation.doubles import Network, SimulatedTrainer, SimulatedWorld
from tink.actors.router import Router
from tink.actors.worker import open_worker
from tink.domain import ids, messages, rows
from tink.domain.requests import OpName
from tink.errors import Overloaded
from tink.journal import store
from tink.journal.database import reader_engine
from tink.journal.home import Home
from tink.journal.journal import Journal
from tink.settings import Settings

TENANT = "default"
# What a client of a crashed worker does before it asks again.
RETRY_SECONDS = 0.5


class Cluster:
    def __init__(self, folder: Path, seed: int, *, loss: float = 0.0, **settings: Any) -> None:
        self._settings = Settings(home=folder, **settings)
        self.rng = random.Random(seed)
        self.home = Home(folder)
        self.home.make()
        self.network = Network(self.rng, loss=loss)
        self.trainer = SimulatedTrainer(self.rng, self.network, self._settings.artifact_root)
        self.router: Router | None = None
        self.journal: Journal | None = None
        self._world: SimulatedWorld | None = None
        self._scope: trio.CancelScope | None = None
        self._started, self._crashed = trio.Event(), trio.Event()
        self.lives = 0

    @classmethod
    @asynccontextmanager
    async def running(
        cls, folder: Path, seed: int = 0, *, loss: float = 0.0, **settings: Any
    ) -> AsyncIterator[Cluster]:
        cluster = cls(folder, seed, loss=loss, **settings)
        async with trio.open_nursery() as nursery:
            cluster._nursery = cluster.trainer.supervisor = nursery
            await cluster.start_trainer()
            await cluster.start_worker()
            yield cluster
            cluster.crash_worker()
            cluster.trainer.kill()
            nursery.cancel_scope.cancel()

    # -- processes ----------------------------------------------------------------------------------

    async def start_trainer(self) -> None:
        await self._nursery.start(self.trainer.run)

    async def start_worker(self) -> None:
        await self._nursery.start(self._run_worker)

    async def _run_worker(self, task_status: trio.TaskStatus[None]) -> None:
        self.lives += 1
        world = self._world = SimulatedWorld(self.rng, self.network)
        try:
            with trio.CancelScope() as self._scope:
                async with (
                    Journal.open(self.home, world, version="sim", settings_digest="sim") as journal,
                    open_worker(journal, self.trainer.find, self._settings, world) as router,
                ):
                    self.router, self.journal = router, journal
                    self._started.set()
                    task_status.started()
                    await trio.sleep_forever()
        except BaseException:
            if not world.dead:
                raise
            # A dead process tells nobody why.
        if not world.dead:
            raise AssertionError("the worker ended by itself")

    def crash_worker(self) -> None:
        """Between two of its steps: what it has not committed never was."""
        assert self._world is not None
        assert self._scope is not None
        self.router = None
        self._started = trio.Event()
        self._crashed.set()
        self._crashed = trio.Event()
        self._world.die()
        self._scope.cancel()

    # -- a client -----------------------------------------------------------------------------------

    async def ask(self, question: messages.Question) -> Any:
        """Asks as the SDK does: a worker that is gone, or says 503, is asked again."""
        while True:
            await self._started.wait()
            router = self.router
            answer: Any = None
            answered = False
            with trio.move_on_after(30.0):
                try:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._give_up_when_dead, nursery.cancel_scope)
                        if router is not None:
                            answer = await router.ask(question)
                            answered = True
                        nursery.cancel_scope.cancel()
                except* Overloaded:
                    answered = False
            if answered:
                return answer
            await trio.sleep(RETRY_SECONDS)

    async def _give_up_when_dead(self, scope: trio.CancelScope) -> None:
        await self._crashed.wait()
        scope.cancel()

    async def router_ask(self, question: messages.Question) -> Any:
        """One try; errors are raised."""
        assert self.router is not None
        return await self.router.ask(question)

    async def keep_trainer_alive(self) -> None:
        """What a supervisor does."""
        while True:
            if self.trainer.app is None:
                await self.start_trainer()
            await trio.sleep(1.0)

    async def session(self) -> str:
        created: messages.Created = await self.ask(
            messages.CreateSession(TENANT, idempotency_key=f"key-{self.rng.getrandbits(64)}")
        )
        return created.id

    async def submit(self, model_id: str, seq: int, op: OpName, body: bytes = b"") -> messages.Promise:
        session_id = model_id.partition(":")[0]
        promise: messages.Promise = await self.ask(
            messages.SubmitTraining(
                TENANT, op=op, session_id=session_id, model_id=model_id, seq_id=seq, body=body
            )
        )
        return promise

    async def create(self, session_id: str, number: int = 0, **config: Any) -> str:
        model_id = ids.model_id(session_id, number)
        body = {
            "session_id": session_id,
            "model_seq_id": number,
            "base_model": "sim/model",
            "lora_config": {"rank": 4, "seed": number, **config},
        }
        await self.ask(
            messages.SubmitTraining(
                TENANT,
                op="create_model",
                session_id=session_id,
                model_id=model_id,
                seq_id=0,
                model_seq_id=number,
                body=msgspec.json.encode(body),
            )
        )
        return model_id

    async def outcome(self, job_id: str) -> messages.Outcome:
        outcome: messages.Outcome = await self.ask(messages.AwaitOutcome(TENANT, job_id))
        return outcome

    # -- what must hold -----------------------------------------------------------------------------

    def check_journal(self) -> None:
        """J3, J4, J6: gapless, one terminal event a job, and the fold equals the tables."""
        engine = reader_engine(self.home.journal)
        with engine.connect() as connection:
            assert store.check(connection) == []
            ends: dict[str, int] = {}
            for record in store.read_events(connection):
                kind = type(record.event).__name__
                if kind in ("JobDone", "JobFailed", "JobCancelled"):
                    ends[str(record.subject.job_id)] = ends.get(str(record.subject.job_id), 0) + 1
            assert set(ends.values()) <= {1}, ends
            jobs = store.read_tables(connection).table("jobs", rows.Job)
            assert {key[0] for key, job in jobs.items() if job.state not in rows.OPEN} == set(ends)
        engine.dispose()


Client = Callable[[Cluster], Awaitable[dict[str, messages.Outcome]]]
