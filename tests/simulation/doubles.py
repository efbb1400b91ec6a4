"""The simulated world. Real: Router, actors, lanes, journal, SQLite, projections, the training server's
HTTP routes, its ledger, its lanes and its artifact folder. Doubles: the clock (Trio's MockClock), ids and
randomness (seeded), threads (inline, with seeded delays), the network (in memory, with seeded faults), and
the engine, which hashes instead of training: its state is a chain over every operation, so that one which
is lost, doubled or out of order changes all that follows.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
import trio

from tink.actors.trainer_link import Endpoint
from tink.errors import BackendError, UserError
from tink.trainer import protocol
from tink.trainer.artifacts import Artifacts
from tink.trainer.engines.base import Facts, Sampled
from tink.trainer.server import Trainer, application
from tink.world import World

T = TypeVar("T")


class Died(Exception):
    """The process that asked for this is dead."""


class SimulatedWorld(World):
    """One process's world. `die()`: from then on nothing that it does has any effect."""

    def __init__(self, rng: random.Random, network: Network, *, slowest: float = 0.05) -> None:
        self._rng, self._network, self._slowest = rng, network, slowest
        self._dead = False

    def die(self) -> None:
        self._dead = True

    def now(self) -> float:
        return 1_700_000_000.0 + trio.current_time()

    def monotonic(self) -> float:
        return trio.current_time()

    def new_id(self) -> str:
        return f"{self._rng.getrandbits(128):032x}"

    def new_seed(self) -> int:
        return self._rng.randrange(2**31)

    async def run_sync(
        self, fn: Callable[..., T], *args: Any, limiter: trio.CapacityLimiter | None = None
    ) -> T:
        token = object()
        if limiter is not None:
            await limiter.acquire_on_behalf_of(token)
        try:
            with trio.CancelScope(shield=True):  # a thread cannot be cancelled
                await trio.sleep(self._rng.random() * self._slowest)
            if self._dead:
                raise Died
            return fn(*args)
        finally:
            if limiter is not None:
                limiter.release_on_behalf_of(token)

    def http_transport(self, origin: str, max_slots: int) -> httpx.AsyncBaseTransport:
        return self._network.transport(self)

    @property
    def dead(self) -> bool:
        return self._dead


class Network(httpx.AsyncBaseTransport):
    """Carries calls to the trainer that runs now. `loss`: how often a request, or else its answer, gets
    lost on the way."""

    def __init__(self, rng: random.Random, *, loss: float = 0.0) -> None:
        self._rng, self.loss = rng, loss
        self.calls = 0
        self.trainer: SimulatedTrainer | None = None

    def transport(self, world: SimulatedWorld) -> httpx.AsyncBaseTransport:
        return self

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.calls += request.url.path not in ("/v1/health", "/v1/state", "/v1/info")
        await trio.sleep(self._rng.random() * 0.01)
        trainer = self.trainer
        if trainer is None or trainer.app is None:
            raise httpx.ConnectError("connection refused", request=request)
        if self._rng.random() < self.loss:
            raise httpx.ReadError("the request was lost", request=request)
        if trainer.deadly is not None and trainer.deadly in await request.aread():
            trainer.kill()
        answer: httpx.Response | None = None
        with trio.CancelScope() as alive:
            trainer.connections.add(alive)
            try:
                if trainer.app is not None:
                    answer = await httpx.ASGITransport(trainer.app).handle_async_request(request)
            except Died:
                pass  # killed in one of its threads: whoever called it sees a connection that ends
            finally:
                trainer.connections.discard(alive)
        if answer is None or trainer.app is None:
            raise httpx.ReadError("connection reset", request=request)
        if self._rng.random() < self.loss:
            raise httpx.ReadError("the answer was lost", request=request)
        return answer


class SimulatedTrainer:
    """A training server that can be killed and started again; what it published under `artifacts` stays."""

    def __init__(self, rng: random.Random, network: Network, artifacts: Path) -> None:
        self._rng, self._network, self.artifacts = rng, network, artifacts
        self.connections: set[trio.CancelScope] = set()
        self.app: Any = None
        self.lives = 0
        # A request that holds these bytes kills it.
        self.deadly: bytes | None = None
        self.disk_full = False
        self.incarnation = ""
        self.supervisor: trio.Nursery | None = None
        self._world: SimulatedWorld | None = None
        self._scope: trio.CancelScope | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """One life; returns when it is killed."""
        self.lives += 1
        world = self._world = SimulatedWorld(self._rng, self._network)
        with trio.CancelScope() as self._scope:
            async with trio.open_nursery() as nursery:
                trainer = Trainer(world, 2, nursery)
                await trainer.load(lambda: HashEngine(self))
                self.app = application(trainer, None)
                self.incarnation = trainer.incarnation
                self._network.trainer = self
                task_status.started()
                await trio.sleep_forever()

    def kill(self) -> None:
        assert self._world is not None
        assert self._scope is not None
        self.app = None
        self._world.die()
        self._scope.cancel()
        for connection in list(self.connections):
            connection.cancel()

    async def find(self, unfit: str | None) -> Endpoint:
        """As the embedded one's supervisor: one that is unfit is ended, and another started."""
        await trio.lowlevel.checkpoint()
        if self.app is not None and self.incarnation == unfit:
            self.kill()
            assert self.supervisor is not None
            await self.supervisor.start(self.run)
        return Endpoint("http://trainer.sim")


class _State(msgspec.Struct):
    chain: str
    gradient: str = ""
    step: int = 0


def _hash(*parts: object) -> str:
    return hashlib.sha256(msgspec.msgpack.encode([str(part) for part in parts])).hexdigest()


class HashEngine:
    """A double of an engine: every result depends on the whole history of its model."""

    def __init__(self, trainer: SimulatedTrainer) -> None:
        self._trainer, self._models = trainer, dict[str, _State]()
        self._artifacts = Artifacts(trainer.artifacts, f"life-{trainer.lives}")

    @property
    def facts(self) -> Facts:
        return Facts(
            "hash", {}, "sim/model", None, "0", "hash", 1, 100, 1000, 64, ["any"], ["train", "sample"]
        )

    def create(self, model_id: str, op: protocol.CreateModel) -> protocol.ModelInfo:
        state = _State(_hash("new", op.seed, op.rank))
        if op.source is not None:
            state = self._saved(op.source, op.optimizer)
        self._models[model_id] = state
        return protocol.ModelInfo(op.rank, op.alpha, op.seed, op.train_attn, op.train_mlp, op.train_unembed)

    def forward(self, model_id: str, op: protocol.Forward) -> protocol.OpResult:
        return self._result(_hash(self._models[model_id].chain, op.body.hex()))

    def forward_backward(self, model_id: str, op: protocol.ForwardBackward) -> protocol.OpResult:
        if b"poison" in op.body:
            raise UserError("poison")
        state = self._models[model_id]
        state.gradient = _hash(state.chain, state.gradient, op.body.hex())
        return self._result(state.gradient)

    def optim_step(self, model_id: str, op: protocol.OptimStep) -> dict[str, float]:
        state = self._models[model_id]
        state.step += 1
        state.chain = _hash(state.chain, state.gradient, op, state.step)
        state.gradient = ""
        return {"step": state.step, "weights": int(state.chain[:12], 16)}

    def save_state(self, model_id: str, op: protocol.SaveState, origin: str) -> list[protocol.File]:
        return self._publish(op.path, origin, state=msgspec.json.encode(self._models[model_id]))

    def load_state(self, model_id: str, op: protocol.LoadState) -> None:
        self._models[model_id] = self._saved(op.path, op.optimizer)

    def export_adapter(self, model_id: str, op: protocol.ExportAdapter, origin: str) -> list[protocol.File]:
        return self._publish(op.path, origin, adapter=self._models[model_id].chain.encode())

    def remove(self, model_id: str) -> None:
        del self._models[model_id]

    def snapshot(self, model_id: str, path: str, book: bytes, origin: str) -> list[protocol.File]:
        state = msgspec.json.encode(self._models[model_id])
        return self._publish(path, origin, state=state, book=book)

    def read_book(self, path: str) -> bytes:
        return self._read(path, "book")

    def restore(self, model_id: str, path: str) -> None:
        self._models[model_id] = msgspec.json.decode(self._read(path, "state"), type=_State)

    def sample(self, request: protocol.SampleRequest) -> Sampled:
        weights = self._read(request.adapter, "adapter").decode() if request.adapter else "base"
        body = _hash(weights, request.prompt, request.seed).encode()
        return Sampled(body, len(request.prompt), request.num_samples)

    def _saved(self, path: str, optimizer: bool) -> _State:
        saved = msgspec.json.decode(self._read(path, "state"), type=_State)
        return _State(saved.chain, step=saved.step if optimizer else 0)

    def _publish(self, path: str, origin: str, **files: bytes) -> list[protocol.File]:
        if self._trainer.disk_full:
            raise BackendError("no space left on device")

        def fill(directory: Path) -> None:
            for name, content in files.items():
                (directory / name).write_bytes(content)

        return self._artifacts.publish(path, origin, {}, fill)

    def _read(self, path: str, name: str) -> bytes:
        directory, _ = self._artifacts.open(path)
        return (directory / name).read_bytes()

    def _result(self, value: str) -> protocol.OpResult:
        return protocol.OpResult(body=value.encode(), loss=int(value[:8], 16) / 1000, tokens=1)
