"""The simulated world. Real: Router, actors, lanes, journal, SQLite, projections, the training server's
HTTP routes, its ledger, its lanes and its artifact folder. Doubles: the clock (Trio's MockClock), ids and
randomness (seeded), threads (inline, with seeded delays), the network (in memory, with seeded faults), and
the engine, which hashes instead of training: its state is a chain over every operation, so that one which
is lost, doubled or out of order changes all that follows.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
import trio
import trio.lowlevel

from tests.simulation.watch import Watch
from tink.backends.endpoint import Endpoint
from tink.errors import BackendError, UserError
from tink.journal.commits import GroupCommit
from tink.journal.journal import Journal, prepare
from tink.trainer import lanes
from tink.trainer.artifacts import Artifacts
from tink.trainer.books import Book
from tink.trainer.engines.interface import Facts
from tink.trainer.server import application
from tink.trainer.trainer import Trainer
from tink.wire import tink_train
from tink.wire import tinker_pb2 as pb
from tink.wire.samples import Sampled
from tink.world import World

T = TypeVar("T")


class Died(Exception):
    """The process that asked for this is dead."""


class Nature:
    """What all processes live in: chance, the wall clock, how long work takes, and what goes on.

    `slow`: how often an operation of the engine takes longer than any call is held. `jump`: by how much
    the wall clock jumps, if it does.
    """

    def __init__(self, seed: int, *, slow: float = 0.0, jump: float = 0.0) -> None:
        self.rng = random.Random(seed)
        self.wall = 1_700_000_000.0
        self.slow, self.jump = slow, jump
        self.going_on: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        # Called with the name of everything that begins.
        self.listeners: list[Callable[[str], None]] = []

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Something that a fault may want to strike at."""
        self.going_on[what] += 1
        try:
            for listener in list(self.listeners):
                listener(what)
            yield
        finally:
            self.going_on[what] -= 1


# The work in threads that has a name for faults.
_WORK: dict[object, str] = {
    GroupCommit._commit_in_turn: "commit",
    prepare: "boot",
    Journal._load: "boot",
}


def work(fn: Callable[..., object]) -> str:
    """What a thread is to do."""
    return _WORK.get(getattr(fn, "__func__", fn), "work")


class SimulatedWorld(World):
    """One process's world. `die()`: from then on nothing that it does has any effect."""

    def __init__(self, nature: Nature, network: Network) -> None:
        self._nature, self._network = nature, network
        self.dead = False

    def die(self) -> None:
        self.dead = True

    def now(self) -> float:
        return self._nature.wall + trio.current_time()

    def monotonic(self) -> float:
        return trio.current_time()

    def new_id(self) -> str:
        return f"{self._nature.rng.getrandbits(128):032x}"

    def new_seed(self) -> int:
        return self._nature.rng.randrange(2**31)

    async def run_sync(
        self, fn: Callable[..., T], *args: Any, limiter: trio.CapacityLimiter | None = None
    ) -> T:
        token = object()
        if limiter is not None:
            await limiter.acquire_on_behalf_of(token)
        try:
            # Shielded: a thread cannot be cancelled.
            with trio.CancelScope(shield=True), self._nature.during(work(fn)):
                await trio.sleep(self.seconds(fn))
                if self.dead:
                    raise Died
                try:
                    return self.perform(fn, *args)
                finally:
                    # It is done, and its process has yet to hear of it.
                    await trio.lowlevel.checkpoint()
                    if self.dead:
                        raise Died
        finally:
            if limiter is not None:
                limiter.release_on_behalf_of(token)

    def seconds(self, fn: Callable[..., object]) -> float:
        return self._nature.rng.random() * 0.05

    def perform(self, fn: Callable[..., T], *args: Any) -> T:
        """At one moment, in a thread."""
        return fn(*args)

    def http_transport(self, origin: str, max_slots: int) -> httpx.AsyncBaseTransport:
        return self._network


class TrainerWorld(SimulatedWorld):
    """`settled`: it listens, or it is dead."""

    def __init__(self, nature: Nature, network: Network, watch: Watch) -> None:
        super().__init__(nature, network)
        self._watch = watch
        self.scope = trio.CancelScope()
        self.settled = trio.Event()

    def seconds(self, fn: Callable[..., object]) -> float:
        computes = fn is lanes.apply or getattr(fn, "__name__", "") == "sample"
        if computes and self._nature.rng.random() < self._nature.slow:
            return self._nature.rng.uniform(15.0, 90.0)
        return super().seconds(fn)

    def perform(self, fn: Callable[..., T], *args: Any) -> T:
        if fn is not lanes.apply:
            return super().perform(fn, *args)
        engine, request = args
        failed = True
        try:
            result = super().perform(fn, *args)
            failed = False
        finally:
            self._watch.applied(request, engine.state(request.model_id), failed=failed)
        return result


class Network(httpx.AsyncBaseTransport):
    """Carries calls to the trainer that runs now. `loss`: how often a request, or else its answer, gets
    lost on the way. `duplicates`: how often a request comes again, later."""

    def __init__(self, nature: Nature, *, loss: float = 0.0, duplicates: float = 0.0) -> None:
        self._nature, self.loss, self._duplicates = nature, loss, duplicates
        self._rng = nature.rng
        self.calls = 0
        self.trainer: SimulatedTrainer | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        trainer = self.trainer
        assert trainer is not None
        self.calls += request.url.path not in ("/v1/health", "/v1/state", "/v1/info")
        await trio.sleep(self._rng.random() * 0.01)
        if trainer.app is None:
            raise httpx.ConnectError("connection refused", request=request)
        if self._rng.random() < self.loss:
            raise httpx.ReadError("the request was lost", request=request)
        content = await request.aread()
        if request.method == "POST" and self._rng.random() < self._duplicates:
            trainer.nursery.start_soon(self._come_again, trainer, request)
        if trainer.would_die_of(request, content):
            trainer.kill()
        with self._nature.during(trainer.kind_of(request, content)):
            answer = await trainer.handle(request)
        if answer is None:
            raise httpx.ReadError("connection reset", request=request)
        if self._rng.random() < self.loss:
            raise httpx.ReadError("the answer was lost", request=request)
        self._nature.counts["long polls"] += answer.status_code == 202
        return answer

    async def _come_again(self, trainer: SimulatedTrainer, request: httpx.Request) -> None:
        """A copy that was under way for longer."""
        await trio.sleep(self._rng.choice([0.0, 0.05, 1.0, 5.0]) * self._rng.random())
        self._nature.counts["requests come twice"] += 1
        await trainer.handle(request)


class SimulatedTrainer:
    """A training server that can be killed and started again; what it published under `artifacts` stays."""

    def __init__(self, nature: Nature, network: Network, artifacts: Path, watch: Watch, slots: int) -> None:
        self._nature, self._network, self.artifacts, self._watch = nature, network, artifacts, watch
        self._slots = slots
        network.trainer = self
        self.app: Any = None
        self.lives = 0
        # An operation or a sample that holds these bytes kills it.
        self.deadly: bytes | None = None
        self.disk_full = False
        # Where it says that its base model is.
        self.base_path: str | None = None
        self.incarnation = ""
        self.version = "1"
        self.engine: HashEngine | None = None
        self.supervisor: trio.Nursery | None = None
        self._connections: set[trio.CancelScope] = set()
        self._world: TrainerWorld | None = None

    @property
    def running(self) -> list[str]:
        """The models whose operations it computes."""
        return [work.model_id for work in self._trainer.health.running if work.model_id]

    @property
    def alive(self) -> bool:
        return self._world is not None and not self._world.dead

    def begin(self) -> TrainerWorld:
        """Another life, for `run`."""
        self.lives += 1
        self._world = TrainerWorld(self._nature, self._network, self._watch)
        self._watch.trainer_started()
        return self._world

    async def run(self, world: TrainerWorld) -> None:
        """Returns when it is killed. It listens at once, and loads its model after that."""
        try:
            with world.scope:
                async with trio.open_nursery() as self.nursery:
                    await trio.lowlevel.checkpoint_if_cancelled()
                    trainer = self._trainer = Trainer(world, self._slots, self.nursery)
                    self.app = application(trainer, None)
                    self.incarnation = trainer.incarnation
                    world.settled.set()
                    engine = self.engine = HashEngine(self, self._watch)
                    await trainer.load(lambda: engine)
                    await trio.sleep_forever()
        except* Died:
            assert world.dead

    async def settled(self) -> None:
        """It listens, or is dead."""
        assert self._world is not None
        await self._world.settled.wait()

    def kill(self) -> None:
        if self._world is None or self._world.dead:
            return
        self.app = None
        self._world.die()
        for connection in list(self._connections):
            connection.cancel()
        self._world.scope.cancel()
        self._world.settled.set()

    async def handle(self, request: httpx.Request) -> httpx.Response | None:
        """The answer, or None if it dies meanwhile."""
        answer, life = None, self.lives
        if self.app is not None:
            with trio.CancelScope() as connection:
                self._connections.add(connection)
                try:
                    # A bug of the server is its 500, and no exception of its caller.
                    server = httpx.ASGITransport(self.app, raise_app_exceptions=False)
                    answer = await server.handle_async_request(request)
                finally:
                    self._connections.discard(connection)
        return answer if self.app is not None and self.lives == life else None

    def would_die_of(self, request: httpx.Request, content: bytes) -> bool:
        if self.deadly is None or request.method != "POST":
            return False
        return self.deadly in content

    def kind_of(self, request: httpx.Request, content: bytes) -> str:
        """For faults: what this request makes the server do."""
        kind = request.url.path.removeprefix("/v1/").partition("/")[0].removesuffix("s")
        if kind != "op":
            return kind
        if request.method == "GET":
            return "poll"
        op = msgspec.msgpack.decode(content, type=tink_train.OpRequest)
        if self._watch.has_ended(op.job_id):
            return "redo"
        ahead = self._watch.is_ahead(op.job_id)
        self._nature.counts["operations ahead"] += ahead
        return "ahead" if ahead else "op"

    async def find(self, unfit: str | None) -> Endpoint:
        """As the embedded one's supervisor: one that is unfit is ended, and another started."""
        await trio.lowlevel.checkpoint()
        if self.app is not None and self.incarnation == unfit:
            self.kill()
            assert self.supervisor is not None
            self.supervisor.start_soon(self.run, self.begin())
            await self.settled()
        return Endpoint("http://trainer.sim")


class State(msgspec.Struct, frozen=True):
    """Of one model, in the engine."""

    chain: str
    gradient: str = ""
    step: int = 0
    rank: int = 0


def _hash(*parts: object) -> str:
    return hashlib.sha256(msgspec.msgpack.encode([str(part) for part in parts])).hexdigest()


class HashEngine:
    """A double of an engine: every result depends on the whole history of its model."""

    def __init__(self, trainer: SimulatedTrainer, watch: Watch) -> None:
        self._trainer, self._watch, self._models = trainer, watch, dict[str, State]()
        self._artifacts = Artifacts(trainer.artifacts, f"life-{trainer.lives}")

    @property
    def facts(self) -> Facts:
        return Facts(
            "hash",
            {"torch": self._trainer.version},
            "sim/model",
            self._trainer.base_path,
            "0",
            "hash",
            1,
            100,
            1000,
            64,
            ["any"],
            ["train", "sample"],
        )

    def state(self, model_id: str) -> State | None:
        return self._models.get(model_id)

    def create(self, model_id: str, op: tink_train.CreateModel) -> tink_train.ModelInfo:
        if op.source is None:
            self._models[model_id] = State(_hash("new", op.seed, op.rank), rank=op.rank)
        else:
            self._models[model_id] = self._saved(op.source, op.optimizer)
        return tink_train.ModelInfo(
            op.rank, op.alpha, op.seed, op.train_attn, op.train_mlp, op.train_unembed
        )

    def forward(self, model_id: str, op: tink_train.Forward) -> tink_train.OpResult:
        return self._result(_hash(self._models[model_id].chain, op.body.hex()))

    def forward_backward(self, model_id: str, op: tink_train.ForwardBackward) -> tink_train.OpResult:
        if b"poison" in op.body:
            raise UserError("poison")
        state = self._models[model_id]
        gradient = _hash(state.chain, state.gradient, op.body.hex())
        self._models[model_id] = msgspec.structs.replace(state, gradient=gradient)
        return self._result(gradient)

    def optim_step(self, model_id: str, op: tink_train.OptimStep) -> dict[str, float]:
        state = self._models[model_id]
        chain = _hash(state.chain, state.gradient, op, state.step + 1)
        self._models[model_id] = State(chain, step=state.step + 1, rank=state.rank)
        return {"step": state.step + 1, "weights": int(chain[:12], 16)}

    def save_state(self, model_id: str, op: tink_train.SaveState, origin: str) -> list[tink_train.File]:
        return self._publish(op.path, origin, state=msgspec.json.encode(self._models[model_id]))

    def load_state(self, model_id: str, op: tink_train.LoadState) -> None:
        self._models[model_id] = self._saved(op.path, op.optimizer)

    def export_adapter(
        self, model_id: str, op: tink_train.ExportAdapter, origin: str
    ) -> list[tink_train.File]:
        """With the one file that a vLLM server reads first."""
        config = msgspec.json.encode({"r": self._models[model_id].rank})
        chain = self._models[model_id].chain.encode()
        return self._publish(op.path, origin, adapter=chain, **{"adapter_config.json": config})

    def remove(self, model_id: str) -> None:
        del self._models[model_id]

    def snapshot(self, model_id: str, path: str, book: bytes, origin: str) -> list[tink_train.File]:
        state = msgspec.json.encode(self._models[model_id])
        return self._publish(path, origin, state=state, book=book)

    def read_book(self, path: str) -> bytes:
        return self._read(path, "book")

    def restore(self, model_id: str, path: str) -> None:
        state = msgspec.json.decode(self._read(path, "state"), type=State)
        book = msgspec.msgpack.decode(self._read(path, "book"), type=Book)
        self._models[model_id] = state
        self._watch.restored(model_id, book.applied, state)

    def sample(self, request: tink_train.SampleRequest) -> Sampled:
        self._watch.sampled(request)
        weights = self._read(request.adapter, "adapter").decode() if request.adapter else "base"
        drawn = bytes.fromhex(_hash(weights, request.prompt, request.seed))
        tokens = bytes(byte % 128 for byte in drawn)  # no number of these is negative
        answer = pb.SampleResponse()
        for _ in range(request.num_samples):
            answer.sequences.add(tokens=tokens, logprobs=bytes(32), stop_reason=pb.STOP_REASON_LENGTH)
        return Sampled(answer.SerializeToString(), len(request.prompt), request.num_samples)

    def _saved(self, path: str, optimizer: bool) -> State:
        saved = msgspec.json.decode(self._read(path, "state"), type=State)
        return State(saved.chain, step=saved.step if optimizer else 0, rank=saved.rank)

    def _publish(self, path: str, origin: str, **files: bytes) -> list[tink_train.File]:
        if self._trainer.disk_full:
            raise BackendError("no space left on device")

        def fill(directory: Path) -> None:
            for name, content in files.items():
                (directory / name).write_bytes(content)

        return self._artifacts.publish(path, origin, {}, fill)

    def _read(self, path: str, name: str) -> bytes:
        directory, _ = self._artifacts.open(path)
        return (directory / name).read_bytes()

    def _result(self, value: str) -> tink_train.OpResult:
        loss = int(value[:8], 16) / 1000
        output = pb.ForwardBackwardOutput(loss_fn_output_type=value, metrics={"loss:sum": loss})
        return tink_train.OpResult(body=output.SerializeToString(), loss=loss, tokens=1)
