"""A training server in this process, quick and exact: right, or wrong in one way.

The real HTTP side and books, before an engine of four weights per model.
"""

from __future__ import annotations

import hashlib
import math
import random
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import msgspec
import trio

from tests.conformance.suite import Server
from tink.errors import BackendError, NotFound, UserError
from tink.trainer.books import Books
from tink.trainer.engines.interface import Facts
from tink.trainer.server import application
from tink.trainer.trainer import Trainer
from tink.wire import tinker_pb2 as pb
from tink.wire.samples import Sampled
from tink.wire.tink_train import (
    CreateModel,
    ExportAdapter,
    File,
    Forward,
    ForwardBackward,
    LoadState,
    ModelInfo,
    OpRequest,
    OpResult,
    OptimStep,
    SampleRequest,
    SaveState,
)
from tink.world import World

WIDTH = 4
# What a token takes, so that a long op can be seen running.
TOKEN_SECONDS = 10e-6
ZERO = (0.0,) * WIDTH


@dataclass(frozen=True)
class State:
    info: ModelInfo
    weights: tuple[float, ...]
    moments: tuple[float, ...] = ZERO
    gradient: tuple[float, ...] = ZERO


@dataclass
class Disk:
    """The artifact folder, which outlives the server."""

    states: dict[str, tuple[str, State]] = field(default_factory=dict)
    books: dict[str, bytes] = field(default_factory=dict)


class Engine:
    facts = Facts("double", {}, "base", None, "d", "arch", 1, 50, 512, 64, ["cross_entropy"], ["sample"])

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.models: dict[str, State] = {}

    def create(self, model_id: str, op: CreateModel) -> ModelInfo:
        if model_id in self.models or op.rank > self.facts.max_rank:
            raise UserError("no")
        if op.source is None:
            info = ModelInfo(op.rank, op.alpha, op.seed, op.train_attn, op.train_mlp, op.train_unembed)
            draw = random.Random(op.seed)
            state = State(info, tuple(draw.uniform(-1, 1) for _ in range(WIDTH)))
        else:
            state = self.read(op.source, op.optimizer)
        self.models[model_id] = state
        return state.info

    def forward(self, model_id: str, op: Forward) -> OpResult:
        return self.run(self.models[model_id], op.body)[0]

    def forward_backward(self, model_id: str, op: ForwardBackward) -> OpResult:
        state = self.models[model_id]
        result, gradient = self.run(state, op.body)
        total = tuple(a + b for a, b in zip(state.gradient, gradient, strict=True))
        self.models[model_id] = replace(state, gradient=total)
        return result

    def optim_step(self, model_id: str, op: OptimStep) -> dict[str, float]:
        state = self.models[model_id]
        moments = tuple(0.5 * m + g for m, g in zip(state.moments, state.gradient, strict=True))
        weights = tuple(w - op.learning_rate * m for w, m in zip(state.weights, moments, strict=True))
        self.models[model_id] = State(state.info, weights, moments)
        return {"grad_norm": math.hypot(*state.gradient)}

    def save_state(self, model_id: str, op: SaveState, origin: str) -> list[File]:
        return self.publish(op.path, origin, replace(self.models[model_id], gradient=ZERO), "weights")

    def load_state(self, model_id: str, op: LoadState) -> None:
        self.models[model_id] = self.read(op.path, op.optimizer)

    def export_adapter(self, model_id: str, op: ExportAdapter, origin: str) -> list[File]:
        names = ("adapter_config.json", "adapter_model.safetensors")
        return self.publish(op.path, origin, self.models[model_id], *names)

    def remove(self, model_id: str) -> None:
        del self.models[model_id]

    def snapshot(self, model_id: str, path: str, book: bytes, origin: str) -> list[File]:
        files = self.publish(path, origin, self.models[model_id], "weights", "book")
        self.disk.books[path] = book
        return files

    def read_book(self, path: str) -> bytes:
        if path not in self.disk.books:
            raise BackendError(f"{path} is damaged")
        return self.disk.books[path]

    def restore(self, model_id: str, path: str) -> None:
        self.models[model_id] = self.disk.states[path][1]

    def sample(self, request: SampleRequest) -> Sampled:
        weights: tuple[float, ...] = ()
        if request.adapter is not None:
            state = self.read(request.adapter, True)
            # As with B = 0: an untrained one changes nothing.
            weights = state.weights if any(state.moments) else ()
        response = pb.SampleResponse()
        for index in range(request.num_samples):
            greedy = request.temperature == 0
            draw = random.Random("greedy" if greedy else f"{request.seed} {self.stream(index)}")
            tokens = draw.choices(range(50), k=request.max_tokens or 1)
            response.sequences.add(tokens=struct.pack(f"<{len(tokens)}i", *tokens))
        if request.prompt_logprobs:
            response.prompt_logprobs = struct.pack(f"<{len(weights)}d", *weights)
        return Sampled(response.SerializeToString(), len(request.prompt), 16)

    # -- the inside ---------------------------------------------------------------------------------

    def stream(self, index: int) -> int:
        return index

    def run(self, state: State, body: bytes) -> tuple[OpResult, tuple[float, ...]]:
        try:
            message = pb.ForwardBackwardRequest.FromString(body)
            data = [
                (
                    struct.unpack(f"<{len(tokens) // 4}i", tokens),
                    struct.unpack(f"<{len(targets) // 8}q", targets),
                )
                for datum in message.data
                for tokens in [datum.model_input[0].encoded_text.tokens]
                for targets in [datum.loss_fn_inputs["target_tokens"].dense]
            ]
        except Exception as error:
            raise UserError(str(error)) from error
        gradient = [0.0] * WIDTH
        output = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
        loss, count = 0.0, 0
        for tokens, targets in data:
            values = []
            for token, target in zip(tokens, targets, strict=True):
                place = (token + target) % WIDTH
                values.append(-2 - math.sin(token + state.weights[place]))
                gradient[place] += math.cos(token * target + state.weights[place])
            loss -= sum(values)
            count += len(tokens)
            record = output.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=1)
            record.fields["logprobs"].data = struct.pack(f"<{len(values)}f", *values)
            record.fields["logprobs"].offsets = struct.pack("<2q", 0, 4 * len(values))
        time.sleep(count * TOKEN_SECONDS)
        result = OpResult(output.SerializeToString(deterministic=True), {"loss:sum": loss}, loss, count)
        return result, tuple(gradient)

    def publish(self, path: str, origin: str, state: State, *names: str) -> list[File]:
        if path.startswith("/") or ".." in path:
            raise UserError("out of the folder")
        if self.disk.states.setdefault(path, (origin, state))[0] != origin:
            raise BackendError(f"{path} exists")
        encoded = repr(self.disk.states[path][1]).encode()
        return [File(name, len(encoded), hashlib.sha256(encoded).hexdigest()) for name in names]

    def read(self, path: str, optimizer: bool) -> State:
        if path not in self.disk.states:
            raise NotFound(f"{path} is not here")
        state = self.disk.states[path][1]
        return state if optimizer else replace(state, moments=ZERO)


@asynccontextmanager
async def conformance(
    engine: type[Engine] = Engine,
    books: type[Books] = Books,
    token: str | None = None,
) -> AsyncIterator[Server]:
    """The suite's view of such a server, connected."""
    disk, transport = Disk(), Switch()
    async with trio.open_nursery() as nursery:

        async def restart() -> None:
            trainer = Trainer(World(), 4, nursery)
            trainer.books = books(trainer.incarnation)
            await trainer.load(lambda: engine(disk))
            transport.to = httpx.ASGITransport(application(trainer, token))

        await restart()
        async with httpx.AsyncClient(transport=transport, base_url="http://trainer") as http:
            server = Server(http, "run", token=token, restart=restart, busy_seconds=0.01)
            await server.connect()
            yield server
        nursery.cancel_scope.cancel()


class Switch(httpx.AsyncBaseTransport):
    """To the server's present life."""

    to: httpx.ASGITransport

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await self.to.handle_async_request(request)


# -- wrong in one way -------------------------------------------------------------------------------


class ForgetsReplays(Books):
    """Runs what it has run, when it is sent again."""

    def decide(self, request: OpRequest) -> Any:
        account = self._accounts.get(request.model_id)
        if account and not account.open and request.op_no <= account.applied:
            account.applied = request.op_no - 1
        return super().decide(request)


class ComputesAgain(Books):
    """Answers a repeat with something else than the stored result."""

    def reply(self, model_id: str, op_no: int, replayed: bool = False) -> Any:
        reply = super().reply(model_id, op_no, replayed)
        if not replayed or reply.result is None:
            return reply
        return msgspec.structs.replace(reply, result=msgspec.structs.replace(reply.result, run_ms=-1.0))


class FencesNobody(Books):
    def admit(self, incarnation: str, lease: int) -> None:
        super().admit(incarnation, max(lease, self.lease))


class TakesAnyIncarnation(Books):
    def admit(self, incarnation: str, lease: int) -> None:
        super().admit(self.incarnation, lease)


class TakesAnyJob(Books):
    def _check_job(self, known: str, job_id: str, op_no: int, applied: int) -> None:
        pass


class RunsWhatWasCancelled(Books):
    def start(self, model_id: str) -> bool:
        self._accounts[model_id].open[0].cancelled = False
        return super().start(model_id)


class ForwardAddsGradient(Engine):
    def forward(self, model_id: str, op: Forward) -> OpResult:
        return self.forward_backward(model_id, ForwardBackward(op.body))


class FailsHalfWay(Engine):
    def forward_backward(self, model_id: str, op: ForwardBackward) -> OpResult:
        try:
            return super().forward_backward(model_id, op)
        except UserError:
            self.models[model_id] = replace(self.models[model_id], gradient=(1.0,) * WIDTH)
            raise


class KeepsTheGradient(Engine):
    def optim_step(self, model_id: str, op: OptimStep) -> dict[str, float]:
        gradient = self.models[model_id].gradient
        metrics = super().optim_step(model_id, op)
        self.models[model_id] = replace(self.models[model_id], gradient=gradient)
        return metrics


class IgnoresTheSeed(Engine):
    def create(self, model_id: str, op: CreateModel) -> ModelInfo:
        super().create(model_id, msgspec.structs.replace(op, seed=0))
        state = self.models[model_id]
        if op.source is None:
            state = replace(state, info=msgspec.structs.replace(state.info, seed=op.seed))
        self.models[model_id] = state
        return state.info


class SharesOneModel(Engine):
    """All models add to one gradient."""

    def forward_backward(self, model_id: str, op: ForwardBackward) -> OpResult:
        result = super().forward_backward(model_id, op)
        gradient = self.models[model_id].gradient
        self.models = {name: replace(state, gradient=gradient) for name, state in self.models.items()}
        return result


class LoadsNoMoments(Engine):
    def read(self, path: str, optimizer: bool) -> State:
        return super().read(path, False)


class SnapshotsNoGradient(Engine):
    def snapshot(self, model_id: str, path: str, book: bytes, origin: str) -> list[File]:
        files = super().snapshot(model_id, path, book, origin)
        self.disk.states[path] = (origin, replace(self.models[model_id], gradient=ZERO))
        return files


class SnapshotsChange(Engine):
    def snapshot(self, model_id: str, path: str, book: bytes, origin: str) -> list[File]:
        files = super().snapshot(model_id, path, book, origin)
        self.models[model_id] = replace(self.models[model_id], gradient=ZERO)
        return files


class WritesOver(Engine):
    def publish(self, path: str, origin: str, state: State, *names: str) -> list[File]:
        self.disk.states.pop(path, None)
        return super().publish(path, origin, state, *names)


class ExportsElsewhere(Engine):
    def export_adapter(self, model_id: str, op: ExportAdapter, origin: str) -> list[File]:
        return self.publish(op.path, origin, self.models[model_id], "model.bin")


class SamplesOneThing(Engine):
    def stream(self, index: int) -> int:
        return 0


class SamplesAnew(Engine):
    def stream(self, index: int) -> int:
        return time.monotonic_ns()


class SamplesTheBase(Engine):
    def sample(self, request: SampleRequest) -> Sampled:
        return super().sample(msgspec.structs.replace(request, adapter=None))
