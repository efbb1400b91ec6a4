"""What the checks stand on: calls to the server under test, models on it, and exact comparison.

Of Tink only the protocol and the SDK's messages are used here: the server may be anyone's.
"""

from __future__ import annotations

import math
import random
import struct
from array import array
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import httpx
import msgspec
import trio

from tink.wire import tinker_pb2 as pb
from tink.wire.tink_train import (
    MEDIA_TYPE,
    CreateModel,
    Forward,
    ForwardBackward,
    Health,
    Info,
    Op,
    OpReply,
    OpRequest,
    OpResult,
    OptimStep,
    Refusal,
    RemoveModel,
    RestoreReply,
    RestoreRequest,
    SampleReply,
    SampleRequest,
    Skip,
    SnapshotReply,
    SnapshotRequest,
    State,
    encode,
)

# On top of the seconds that a call asks to be held.
GRACE_SECONDS = 60.0
# An operation, a snapshot or a start that takes longer is taken for stuck.
LONGEST_SECONDS = 600.0
# Large enough a step that any gradient too many, or too few, shows in the next results.
STEP = OptimStep(learning_rate=0.01)


class Wrong(Exception):
    """The server broke a promise: what was expected, and what came."""


class NotRun(Exception):
    """The check needs something that is not there."""


def expect(what: str, expected: Any, got: Any) -> None:
    if expected == got:
        return
    if isinstance(expected, msgspec.Struct) and type(expected) is type(got):
        for name in expected.__struct_fields__:
            expect(f"{what}: {name}", getattr(expected, name), getattr(got, name))
    raise Wrong(f"{what}: expected {_short(expected)}, got {_short(got)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}... ({len(text)} characters)"


class Answer(NamedTuple):
    """`message`: a Refusal unless the status is 200 or 202."""

    status: int
    message: Any

    @property
    def short(self) -> tuple[int, str]:
        """The status and the table's word, or the state."""
        word = getattr(self.message, "error", None) or getattr(self.message, "state", "")
        return self.status, word


class Server:
    """The server under test. `restart` kills it and starts it again. `busy_seconds`: how long an
    operation must run to be seen running. `tolerance`: numbers that should be equal and differ by no
    more than this are a warning; 0.0 allows no difference."""

    incarnation: str
    info: Info

    def __init__(
        self,
        http: httpx.AsyncClient,
        run: str,
        *,
        token: str | None = None,
        restart: Callable[[], Awaitable[None]] | None = None,
        busy_seconds: float = 0.1,
        tolerance: float = 1e-3,
    ) -> None:
        self.http, self.run, self.token, self.restart = http, run, token, restart
        self.busy_seconds, self.tolerance = busy_seconds, tolerance
        self.lease = 1
        self.warnings: list[str] = []
        self._models = 0
        self._heavy: bytes | None = None

    # -- calls --------------------------------------------------------------------------------------

    async def call(
        self,
        method: str,
        path: str,
        kind: type | None,
        message: Any = None,
        wait: float = 0.0,
        token: str | None = None,
    ) -> Answer:
        """`message`: bytes are sent as they are. `kind`: of the answer's message; None: it has none."""
        content = message if isinstance(message, bytes | None) else encode(message)
        headers = {"Content-Type": MEDIA_TYPE} if content is not None else {}
        token = self.token if token is None else token
        if token:
            headers["Authorization"] = f"Bearer {token}"
        seconds = wait + GRACE_SECONDS
        with trio.move_on_after(seconds) as scope:
            answer = await self.http.request(method, path, content=content, headers=headers)
        if scope.cancelled_caught:
            raise Wrong(f"{method} {path}: no answer within {seconds:g} s")
        wanted = kind if answer.status_code in (200, 202) else Refusal
        if wanted is None:
            return Answer(answer.status_code, None)
        json = wanted in (Health, Info, State)
        try:
            decode: Any = msgspec.json.decode if json else msgspec.msgpack.decode
            return Answer(answer.status_code, decode(answer.content, type=wanted))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise Wrong(
                f"{method} {path}: expected a {wanted.__name__}, got status {answer.status_code} with "
                f"{answer.content[:80]!r} ({error})"
            ) from error

    async def health(self) -> Health:
        answer = await self.call("GET", "/v1/health", Health)
        expect("status of health", 200, answer.status)
        return answer.message

    async def state(self) -> State:
        answer = await self.call("GET", "/v1/state", State)
        expect("status of state", 200, answer.status)
        return answer.message

    async def connect(self, other_than: str | None = None) -> None:
        """Waits until it is ready, in another life than that one. Raises Wrong."""
        health = None
        with trio.move_on_after(LONGEST_SECONDS):
            while health is None or health.state == "loading" or health.incarnation == other_than:
                await trio.sleep(0.1 if health else 0.0)
                try:
                    health = await self.health()
                except httpx.TransportError:
                    if other_than is None:
                        raise
                    await trio.sleep(0.1)
        if health is None or health.state != "ready" or health.incarnation == other_than:
            raise Wrong(f"the server was expected to become ready in a new life, it says {health}")
        answer = await self.call("GET", "/v1/info", Info)
        expect("status of info", 200, answer.status)
        self.incarnation, self.info = health.incarnation, answer.message
        self.lease = max(self.lease, (await self.state()).lease)

    async def restarted(self) -> str:
        """Kills it and starts it again; returns the incarnation that it had."""
        if self.restart is None:
            raise NotRun("needs --restart")
        before = self.incarnation
        await self.restart()
        await self.connect(other_than=before)
        return before

    async def snapshot(self, model: Model, path: str, **fields: Any) -> Answer:
        request = SnapshotRequest(**self._envelope(model, path) | fields)
        return await self.call("POST", "/v1/snapshots", SnapshotReply, request, LONGEST_SECONDS)

    async def restore(self, model: Model, path: str, **fields: Any) -> Answer:
        request = RestoreRequest(**self._envelope(model, path) | fields)
        return await self.call("POST", "/v1/restores", RestoreReply, request, LONGEST_SECONDS)

    def _envelope(self, model: Model, path: str) -> dict[str, Any]:
        return {
            "incarnation": self.incarnation,
            "lease": self.lease,
            "model_id": model.model_id,
            "path": path,
        }

    async def sample(self, name: str, **fields: Any) -> Answer:
        """To its end, however it ends."""
        given = {"prompt": self.tokens(0, 6), "seed": 5, "max_tokens": 16, "ignore_eos": True, **fields}
        request = SampleRequest(f"{self.run}-{name}", **given)
        answer = await self.call("POST", "/v1/samples", SampleReply, request, request.wait)
        with trio.move_on_after(LONGEST_SECONDS):
            while answer.status == 202:
                path = f"/v1/samples/{request.sample_id}?wait=20"
                answer = await self.call("GET", path, SampleReply, wait=20)
        return answer

    # -- what to send -------------------------------------------------------------------------------

    def model(self, name: str = "") -> Model:
        """One that the server has never heard of."""
        self._models += 1
        return Model(self, f"{self.run}-{self._models}{name}")

    def path(self, name: str) -> str:
        """A new path in the artifact folder."""
        self._models += 1
        return f"conformance/{self.run}/{self._models}-{name}"

    def create(self, **fields: Any) -> CreateModel:
        unembed = "unembed" in self.info.capabilities
        return CreateModel(**{"rank": 4, "alpha": 8.0, "seed": 7, "train_unembed": unembed} | fields)

    def tokens(self, seed: int, count: int) -> list[int]:
        return random.Random(seed).choices(range(self.info.vocab_size), k=count)

    def body(self, seed: int, lengths: Sequence[int] = (5, 40, 17)) -> bytes:
        """A supervised batch of random text."""
        message = pb.ForwardBackwardRequest(model_id="conformance", seq_id=1, loss_fn="cross_entropy")
        draw = random.Random(seed)
        for length in lengths:
            length = min(length, self.info.max_context)
            weights = [draw.uniform(0.5, 1.5) for _ in range(length)]
            tokens = self.tokens(draw.randrange(2**30), length)
            datum = message.data.add()
            datum.model_input.add().encoded_text.tokens = struct.pack(f"<{length}i", *tokens)
            targets = self.tokens(draw.randrange(2**30), length)
            for name, kind, data in (
                ("target_tokens", pb.DTYPE_INT64, struct.pack(f"<{length}q", *targets)),
                ("weights", pb.DTYPE_FLOAT32, struct.pack(f"<{length}f", *weights)),
            ):
                tensor = pb.Tensor(dense=data, dtype=kind, shape=[length])
                datum.loss_fn_inputs[name].CopyFrom(tensor)
        return message.SerializeToString()

    async def heavy(self) -> bytes:
        """A body that keeps the server busy for `busy_seconds`, or as long as 1024 data do."""
        count = 4
        while self._heavy is None:
            count *= 2
            body = self.body(1, [256] * count)
            model = self.model("-busy")
            await model.do(self.create())
            began = trio.current_time()
            await model.do(Forward(body))
            if trio.current_time() - began >= self.busy_seconds or count >= 1024:
                self._heavy = body
            await model.remove()
        return self._heavy

    # -- comparing ----------------------------------------------------------------------------------

    def same(self, what: str, expected: Sequence[OpResult], got: Sequence[OpResult]) -> None:
        """Bit for bit, but for times. A difference within the tolerance is a warning."""
        expect(f"{what}: number of results", len(expected), len(got))
        worst = max((_difference(one, other) for one, other in zip(expected, got, strict=True)), default=0)
        if worst == 0.0:
            return
        found = f"{what}: bitwise: no, max difference {worst:.3g}"
        if worst > self.tolerance:
            raise Wrong(found)
        self.warnings.append(found)

    def differ(self, what: str, one: OpResult, other: OpResult) -> None:
        """By more than rounding could explain."""
        worst = _difference(one, other)
        if worst <= self.tolerance:
            raise Wrong(
                f"{what}: expected a difference over {self.tolerance:g}, got {worst:.3g} (too small a "
                "tolerance or too small a model would also explain it)"
                if worst
                else f"{what}: expected other numbers, got the same ones"
            )


class Model:
    """A model on the server; `last`: the number of the operation sent last."""

    def __init__(self, server: Server, model_id: str) -> None:
        self.server, self.model_id, self.last = server, model_id, 0

    async def send(
        self, op: Op, op_no: int | None = None, wait: float = 0.0, patient: bool = True, **fields: Any
    ) -> Answer:
        """As the next operation unless told otherwise. A full queue is asked again while `patient`."""
        number = self.last + 1 if op_no is None else op_no
        if op_no is None:
            self.last = number
        request = OpRequest(
            **{
                "incarnation": self.server.incarnation,
                "lease": self.server.lease,
                "model_id": self.model_id,
                "op_no": number,
                "job_id": f"{self.model_id}-{number}",
                "op": op,
                "wait": wait,
            }
            | fields
        )
        answer = await self.server.call("POST", "/v1/ops", OpReply, request, wait)
        with trio.move_on_after(LONGEST_SECONDS):
            while patient and answer.short == (429, "busy"):
                await trio.sleep(0.05)
                answer = await self.server.call("POST", "/v1/ops", OpReply, request, wait)
        return answer

    async def poll(self, op_no: int, wait: float = 0.0) -> Answer:
        path = f"/v1/ops/{self.model_id}/{op_no}?wait={wait:g}"
        return await self.server.call("GET", path, OpReply, wait=wait)

    async def end(self, op_no: int) -> OpReply:
        """How it ended, through as many long polls as it takes."""
        with trio.move_on_after(LONGEST_SECONDS):
            while True:
                answer = await self.poll(op_no, wait=20)
                if answer.status != 202:
                    break
        expect(f"status of op {op_no} when polled to its end", 200, answer.status)
        return answer.message

    async def ends(self, op: Op, **fields: Any) -> OpReply:
        """Sends it as the next one, and waits for its end, however it ends."""
        answer = await self.send(op, wait=20, **fields)
        if answer.status not in (200, 202):
            raise Wrong(
                f"{type(op).__name__} as op {self.last}: expected it to run, got {answer.status} "
                f"{answer.message}"
            )
        reply = answer.message if answer.status == 200 else await self.end(self.last)
        expect(f"applied after op {self.last}", self.last, reply.applied)
        return reply

    async def do(self, op: Op, **fields: Any) -> OpResult:
        """Sends it as the next one; it must succeed."""
        reply = await self.ends(op, **fields)
        if reply.state != "done" or reply.result is None:
            raise Wrong(
                f"{type(op).__name__} as op {self.last}: expected done, got {reply.state}: {reply.failure}"
            )
        return reply.result

    async def fails(self, op: Op, **fields: Any) -> OpReply:
        """Sends it as the next one; it must fail, and consume its number."""
        reply = await self.ends(op, **fields)
        expect(f"state of a {type(op).__name__} that cannot be done", "failed", reply.state)
        if reply.failure is None or not reply.failure.message:
            raise Wrong(f"a failed op should say why in `failure`, it says {reply.failure}")
        return reply

    async def train(self, seed: int = 10, steps: int = 2) -> list[OpResult]:
        """Two batches before each step, and a look at the result."""
        results = []
        for step in range(steps):
            for part in range(2):
                body = self.server.body(seed + 10 * step + part)
                results.append(await self.do(ForwardBackward(body)))
            results.append(await self.do(STEP))
        return [*results, await self.look()]

    async def look(self) -> OpResult:
        """What the weights are, in numbers."""
        return await self.do(Forward(self.server.body(99)))

    async def probe(self) -> list[OpResult]:
        """All of its state, in numbers: accumulated gradient, moments and weights show in what comes."""
        body = self.server.body(98)
        return [
            await self.look(),
            await self.do(STEP),
            await self.look(),
            await self.do(ForwardBackward(body)),
            await self.do(STEP),
            await self.look(),
        ]

    async def skip(self, count: int = 1) -> None:
        for _ in range(count):
            await self.do(Skip())

    async def remove(self) -> None:
        await self.do(RemoveModel(), acked=self.last)


def numbers(result: OpResult) -> dict[str, array[float]]:
    """All that an operation computed, by name."""
    found = {f"metric {name}": array("d", [value]) for name, value in result.metrics.items()}
    if result.loss is not None:
        found["loss"] = array("d", [result.loss])
    output = pb.ForwardBackwardOutput.FromString(result.body)
    for name, value in output.metrics.items():
        found[f"body metric {name}"] = array("d", [value])
    for index, record in enumerate(output.loss_fn_outputs):
        for name, field in record.fields.items():
            found[f"{name} {index} {tuple(field.trailing_shape)}"] = array("f", field.data)
    return found


def _difference(one: OpResult, other: OpResult) -> float:
    """0.0: the same bit for bit. inf: not comparable."""
    left, right = numbers(one), numbers(other)
    if left.keys() != right.keys() or one.tokens != other.tokens or one.model != other.model:
        return math.inf
    worst = 0.0
    for name, values in left.items():
        others = right[name]
        if values.tobytes() == others.tobytes():
            continue
        if len(values) != len(others):
            return math.inf
        for a, b in zip(values, others, strict=True):
            gap = abs(a - b) / max(1.0, abs(a))
            worst = max(worst, gap if math.isfinite(gap) else math.inf)
        worst = max(worst, 5e-324)  # -0.0 and 0.0 are equal, and not the same bits
    return worst
