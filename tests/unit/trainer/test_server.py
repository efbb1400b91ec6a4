"""The protocol over HTTP, with an engine whose operations end when the test says so."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import msgspec
import pytest
import structlog
import trio

from tink.errors import BackendError, UserError
from tink.limits import TRAINER_AHEAD, TRAINER_QUEUE
from tink.trainer import server
from tink.trainer.engines.interface import Engine, Facts
from tink.trainer.server import application
from tink.trainer.trainer import Trainer
from tink.wire.samples import Sampled
from tink.wire.tink_train import (
    MEDIA_TYPE,
    CreateModel,
    ExportAdapter,
    File,
    Forward,
    ForwardBackward,
    LoadState,
    ModelInfo,
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
    SaveState,
    Skip,
    SnapshotReply,
    SnapshotRequest,
    encode,
)
from tink.world import World

CREATE = CreateModel(rank=4, alpha=8.0, seed=1)
INFO = ModelInfo(4, 8.0, 1, True, True, True)
FACTS = Facts("double", {}, "base", None, "d", "arch", 1, 2, 3, 4, ["ppo"], ["train", "sample"])


class EngineDouble:
    """Operations pass `gate` (open at first); what ran is in `ran`. `fails` raises in its place."""

    facts = FACTS

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.ran: list[tuple[str, str]] = []
        self.fails: Exception | None = None
        self.at_once = self.most_at_once = 0
        self.books: dict[str, bytes] = {}
        self.restored: list[str] = []
        self._lock = threading.Lock()

    def _run(self, model_id: str, what: str) -> None:
        with self._lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        self.gate.wait(10)
        with self._lock:
            self.at_once -= 1
            self.ran.append((model_id, what))
        if self.fails:
            raise self.fails

    def create(self, model_id: str, op: CreateModel) -> ModelInfo:
        self._run(model_id, "create")
        return INFO

    def forward(self, model_id: str, op: Forward) -> OpResult:
        self._run(model_id, "forward")
        return OpResult(body=op.body)

    def forward_backward(self, model_id: str, op: ForwardBackward) -> OpResult:
        self._run(model_id, "forward_backward")
        return OpResult(body=op.body, loss=1.5, tokens=3, metrics={"loss:sum": 1.5})

    def optim_step(self, model_id: str, op: OptimStep) -> dict[str, float]:
        self._run(model_id, "optim_step")
        return {"step": 1.0}

    def save_state(self, model_id: str, op: SaveState, origin: str) -> list[File]:
        self._run(model_id, origin)
        return [File("f", 1, "h")]

    def load_state(self, model_id: str, op: LoadState) -> None:
        self._run(model_id, "load_state")

    def export_adapter(self, model_id: str, op: ExportAdapter, origin: str) -> list[File]:
        self._run(model_id, origin)
        return []

    def remove(self, model_id: str) -> None:
        self._run(model_id, "remove")

    def snapshot(self, model_id: str, path: str, book: bytes, origin: str) -> list[File]:
        self._run(model_id, origin)
        self.books[path] = book
        return [File("f", 1, "h")]

    def read_book(self, path: str) -> bytes:
        if path not in self.books:
            raise BackendError(f"{path} is damaged")
        return self.books[path]

    def restore(self, model_id: str, path: str) -> None:
        self._run(model_id, "restore")
        self.restored.append(model_id)

    def sample(self, request: SampleRequest) -> Sampled:
        self._run(request.sample_id, "sample")
        return Sampled(b"body", len(request.prompt), 5)


class Caller:
    """Speaks the protocol."""

    def __init__(self, client: httpx.AsyncClient, trainer: Trainer) -> None:
        self.http, self.trainer = client, trainer
        self.incarnation = trainer.incarnation

    async def post(self, path: str, message: Any, kind: type) -> tuple[int, Any]:
        answer = await self.http.post(path, content=encode(message))
        return self._read(answer, kind)

    async def get(self, path: str, kind: type) -> tuple[int, Any]:
        return self._read(await self.http.get(path), kind)

    def _read(self, answer: httpx.Response, kind: type) -> tuple[int, Any]:
        assert answer.headers["content-type"] == MEDIA_TYPE
        kind = kind if answer.status_code in (200, 202) else Refusal
        return answer.status_code, msgspec.msgpack.decode(answer.content, type=kind)

    async def op(self, op_no: int, op: Op | None = None, **fields: Any) -> tuple[int, Any]:
        defaults = {"incarnation": self.incarnation, "lease": 1, "model_id": "m", "job_id": f"j{op_no}"}
        op = op or (CREATE if op_no == 1 else OptimStep())
        return await self.post("/v1/ops", OpRequest(op_no=op_no, op=op, **defaults | fields), OpReply)

    async def sample(self, sample_id: str, **fields: Any) -> tuple[int, Any]:
        request = SampleRequest(sample_id, **{"prompt": [1, 2], "seed": 1} | fields)
        return await self.post("/v1/samples", request, SampleReply)

    async def health(self) -> dict[str, Any]:
        return (await self.http.get("/v1/health")).json()


@asynccontextmanager
async def serving(
    engine: Engine | Callable[[], Engine], slots: int = 4, token: str | None = None, wait_ready: bool = True
) -> AsyncIterator[Caller]:
    build = engine if callable(engine) else lambda: engine
    async with trio.open_nursery() as nursery:
        trainer = Trainer(World(), slots, nursery)
        if wait_ready:
            await trainer.load(build)
        else:
            nursery.start_soon(trainer.load, build)
        transport = httpx.ASGITransport(application(trainer, token))
        async with httpx.AsyncClient(transport=transport, base_url="http://trainer") as client:
            yield Caller(client, trainer)
        if isinstance(engine, EngineDouble):
            engine.gate.set()
        nursery.cancel_scope.cancel()


@pytest.fixture
def double() -> EngineDouble:
    return EngineDouble()


@pytest.fixture
async def caller(double: EngineDouble) -> AsyncIterator[Caller]:
    async with serving(double) as caller:
        yield caller


# -- answers --------------------------------------------------------------------------------------


async def test_every_op_reaches_the_engine_and_answers(caller: Caller, double: EngineDouble) -> None:
    ops: list[Op] = [
        CREATE,
        Forward(b"x"),
        ForwardBackward(b"y"),
        OptimStep(),
        SaveState("p"),
        LoadState("p", True),
        ExportAdapter("q"),
        Skip(),
        RemoveModel(),
    ]
    results = []
    for number, op in enumerate(ops, 1):
        status, reply = await caller.op(number, op)
        assert (status, reply.state, reply.applied) == (200, "done", number)
        results.append(reply.result)
    assert results[0].model == INFO
    assert (results[1].body, results[2].loss, results[3].metrics) == (b"x", 1.5, {"step": 1.0})
    assert results[4].files == [File("f", 1, "h")]
    assert [what for _, what in double.ran] == [
        "create",
        "forward",
        "forward_backward",
        "optim_step",
        "m:5:j5",
        "load_state",
        "m:7:j7",
        "remove",
    ]


async def test_a_repeat_is_answered_from_memory(caller: Caller, double: EngineDouble) -> None:
    await caller.op(1)
    first = (await caller.op(2))[1]
    status, again = await caller.op(2)
    assert (status, again.replayed, again.result) == (200, True, first.result)
    assert len(double.ran) == 2


async def test_a_long_op_is_202_and_then_polled(caller: Caller, double: EngineDouble) -> None:
    double.gate.clear()
    status, reply = await caller.op(1, wait=0.0)
    assert (status, reply.state, reply.applied) == (202, "queued", 0)
    status, reply = await caller.get("/v1/ops/m/1?wait=0.01", OpReply)
    assert (status, reply.state) == (202, "running")
    double.gate.set()
    status, reply = await caller.get("/v1/ops/m/1?wait=5", OpReply)
    assert (status, reply.state, reply.applied) == (200, "done", 1)


async def test_a_repeat_joins_the_running_op(caller: Caller, double: EngineDouble) -> None:
    double.gate.clear()
    await caller.op(1, wait=0.0)
    replies = []

    async def again() -> None:
        replies.append(await caller.op(1))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(again)
        nursery.start_soon(again)
        await trio.testing.wait_all_tasks_blocked()
        double.gate.set()
    assert [(status, reply.state) for status, reply in replies] == [(200, "done")] * 2
    assert len(double.ran) == 1


async def test_a_lost_connection_cancels_nothing(caller: Caller, double: EngineDouble) -> None:
    double.gate.clear()
    with trio.move_on_after(0.05):
        await caller.op(1)
    double.gate.set()
    status, reply = await caller.get("/v1/ops/m/1?wait=5", OpReply)
    assert (status, reply.state) == (200, "done")


async def test_health_is_answered_while_it_computes(caller: Caller, double: EngineDouble) -> None:
    double.gate.clear()
    await caller.op(1, wait=0.0)
    await caller.get("/v1/ops/m/1?wait=0.01", OpReply)
    health = await caller.health()
    assert health["state"] == "ready"
    (running,) = health["running"]
    assert (running["model_id"], running["op_no"], running["job_id"]) == ("m", 1, "j1")


@pytest.mark.parametrize(
    ("error", "category"),
    [(UserError("bad"), "user"), (BackendError("disk"), "server"), (RuntimeError("oom"), "server")],
)
async def test_a_failed_op_is_an_answer_and_consumes_its_number(
    caller: Caller, double: EngineDouble, error: Exception, category: str
) -> None:
    await caller.op(1)
    double.fails = error
    status, reply = await caller.op(2)
    assert (status, reply.state, reply.applied) == (200, "failed", 2)
    assert reply.failure.category == category
    assert str(error) in reply.failure.message
    double.fails = None
    assert (await caller.op(2))[1].failure == reply.failure
    assert (await caller.op(3))[1].state == "done"


async def test_ops_sent_ahead_run_in_order(caller: Caller, double: EngineDouble) -> None:
    double.gate.clear()
    for number in range(1, TRAINER_AHEAD + 2):
        status, _ = await caller.op(number, wait=0.0)
        assert status == 202
    status, refusal = await caller.op(TRAINER_AHEAD + 2)
    assert (status, refusal.error, refusal.retryable) == (429, "busy", True)
    double.gate.set()
    status, reply = await caller.get(f"/v1/ops/m/{TRAINER_AHEAD + 1}?wait=5", OpReply)
    assert (status, reply.applied) == (200, TRAINER_AHEAD + 1)


async def test_a_queued_op_can_be_cancelled(caller: Caller, double: EngineDouble) -> None:
    double.gate.clear()
    await caller.op(1, wait=0.0)
    await caller.op(2, SaveState("p"), wait=0.0)
    status, reply = await caller.post("/v1/ops/m/2/cancel", None, OpReply)
    assert (status, reply.state, reply.failure.category) == (200, "failed", "user")
    double.gate.set()
    assert (await caller.op(3))[1].applied == 3
    assert [what for _, what in double.ran] == ["create", "optim_step"]


@pytest.mark.parametrize(("device", "most"), [("cpu", 2), ("NVIDIA H200", 1)])
async def test_models_run_side_by_side_up_to_the_slots_and_one_at_a_time_on_a_gpu(
    double: EngineDouble, device: str, most: int
) -> None:
    """The memory that a batch may take there is there once."""
    double.facts = replace(FACTS, versions={"device": device})
    async with serving(double, slots=2) as caller:
        double.gate.clear()
        for model in "abc":
            await caller.op(1, model_id=model, wait=0.0)
        await caller.get("/v1/ops/a/1?wait=0.05", OpReply)
        double.gate.set()
        for model in "abc":
            assert (await caller.get(f"/v1/ops/{model}/1?wait=5", OpReply))[0] == 200
        assert double.most_at_once == most


# -- refusals -------------------------------------------------------------------------------------


async def test_every_refusal_has_its_status(caller: Caller, double: EngineDouble) -> None:
    await caller.op(1, lease=7)
    await caller.op(2, lease=7)
    await caller.op(3, lease=7, acked=2)
    found = {
        "stale": await caller.op(4, incarnation="before", lease=7),
        "fenced": await caller.op(4, lease=6),
        "gap": await caller.op(5, lease=7),
        "reused": await caller.op(3, lease=7, job_id="other"),
        "gone": await caller.op(2, lease=7),
        "absent": await caller.op(1, OptimStep(), lease=7, model_id="n"),
        "unsent": await caller.get("/v1/ops/m/9", OpReply),
        "unknown": await caller.get("/v1/ops/n/1", OpReply),
        "sample": await caller.get("/v1/samples/none", SampleReply),
    }
    assert {name: (status, refusal.error) for name, (status, refusal) in found.items()} == {
        "stale": (412, "stale_incarnation"),
        "fenced": (409, "fenced"),
        "gap": (409, "gap"),
        "reused": (422, "op_reused"),
        "gone": (410, "result_gone"),
        "absent": (404, "no_model"),
        "unsent": (404, "no_op"),
        "unknown": (404, "no_model"),
        "sample": (404, "no_sample"),
    }
    assert all(refusal.incarnation == caller.incarnation for _, refusal in found.values())
    assert found["gap"][1].applied == 3
    assert len(double.ran) == 3


@pytest.mark.parametrize("content", [b"", b"\xff", b"{}", b"\x80", b"\x81\xabincarnation\xa1\xff"])
async def test_a_malformed_body_is_refused(caller: Caller, content: bytes) -> None:
    for path in ("/v1/ops", "/v1/samples", "/v1/snapshots", "/v1/restores"):
        answer = await caller.http.post(path, content=content)
        refusal = msgspec.msgpack.decode(answer.content, type=Refusal)
        assert (answer.status_code, refusal.error) == (400, "malformed")


async def test_each_op_says_how_long_the_server_was_idle_before_it(caller: Caller) -> None:
    first, second = [(await caller.op(op_no))[1].result for op_no in (1, 2)]
    assert first.idle_ms == 0.0
    assert second.idle_ms > 0.0
    assert 0.0 <= second.queued_ms < 1000.0
    assert (await caller.op(2))[1].result == second


# httpx, playing the server here, leaves the rest of the body to the garbage collector.
@pytest.mark.filterwarnings("ignore:Async generator 'httpx:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_body_is_read_no_further_than_its_limit(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_TRAINER_BODY", 100)
    status, refusal = await caller.op(1, ForwardBackward(b"x" * 200))
    assert (status, refusal.error) == (413, "too_large")


async def test_a_token_guards_everything_but_health(double: EngineDouble) -> None:
    async with serving(double, token="secret") as caller:
        assert (await caller.health())["state"] == "ready"
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            answer = await caller.http.get("/v1/state", headers=headers)
            refusal = msgspec.msgpack.decode(answer.content, type=Refusal)
            assert (answer.status_code, refusal.error) == (401, "unauthorized")
        caller.http.headers["Authorization"] = "Bearer secret"
        assert (await caller.http.get("/v1/state")).status_code == 200


async def test_nothing_but_health_is_answered_while_loading(double: EngineDouble) -> None:
    loaded = threading.Event()

    def build() -> Engine:
        loaded.wait(10)
        return double

    async with serving(build, wait_ready=False) as caller:
        assert (await caller.health())["state"] == "loading"
        for path in ("/v1/info", "/v1/state"):
            answer = await caller.http.get(path)
            assert answer.status_code == 503
            assert msgspec.msgpack.decode(answer.content, type=Refusal).retryable
        assert (await caller.op(1))[0] == 503
        loaded.set()
        while (await caller.health())["state"] == "loading":
            await trio.lowlevel.checkpoint()
        assert (await caller.http.get("/v1/info")).json()["base_model"] == "base"


async def test_an_engine_that_cannot_be_built_is_told_by_health() -> None:
    def build() -> Engine:
        raise OSError("no such file")

    async with serving(build) as caller:
        health = await caller.health()
        assert (health["state"], health["detail"]) == ("broken", "OSError: no such file")
        assert (await caller.op(1))[1].error == "broken"


# -- snapshots ------------------------------------------------------------------------------------


def snapshot(caller: Caller, path: str, model_id: str = "m") -> SnapshotRequest:
    return SnapshotRequest(caller.incarnation, 1, model_id, path)


async def test_a_snapshot_is_taken_between_two_ops(caller: Caller, double: EngineDouble) -> None:
    await caller.op(1)
    double.gate.clear()
    await caller.op(2, wait=0.0)
    await caller.op(3, wait=0.0)
    replies = []

    async def take() -> None:
        replies.append(await caller.post("/v1/snapshots", snapshot(caller, "s"), SnapshotReply))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        await trio.testing.wait_all_tasks_blocked()
        double.gate.set()
    ((status, reply),) = replies
    assert (status, reply.applied) == (200, 2)
    assert ("m", "snapshot:m:2") in double.ran


async def test_a_new_trainer_goes_on_from_a_snapshot(caller: Caller, double: EngineDouble) -> None:
    """With the results that were not acked."""
    await caller.op(1)
    await caller.op(2)
    _, third = await caller.op(3, acked=1)
    await caller.post("/v1/snapshots", snapshot(caller, "s"), SnapshotReply)
    async with serving(double) as other:
        restore = RestoreRequest(other.incarnation, 1, "m", "s")
        assert await other.post("/v1/restores", restore, RestoreReply) == (200, RestoreReply(3))
        assert double.restored == ["m"]
        status, reply = await other.op(3)
        assert (status, reply.replayed, reply.result) == (200, True, third.result)
        assert reply.incarnation == other.incarnation
        assert (await other.op(1))[0] == 410
        assert (await other.op(4))[1].applied == 4
        status, refusal = await other.post("/v1/restores", restore, RestoreReply)
        assert (status, refusal.error, refusal.applied) == (409, "not_behind", 4)


async def test_a_damaged_snapshot_is_refused(caller: Caller, double: EngineDouble) -> None:
    restore = RestoreRequest(caller.incarnation, 1, "m", "nothing")
    status, refusal = await caller.post("/v1/restores", restore, RestoreReply)
    assert (status, refusal.error, refusal.message) == (502, "failed", "nothing is damaged")
    assert (await caller.op(1))[0] == 200


async def test_an_absent_model_has_no_snapshot(caller: Caller) -> None:
    status, refusal = await caller.post("/v1/snapshots", snapshot(caller, "s"), SnapshotReply)
    assert (status, refusal.error) == (404, "no_model")


# -- samples --------------------------------------------------------------------------------------


async def test_a_sample_is_answered_and_kept(caller: Caller, double: EngineDouble) -> None:
    status, reply = await caller.sample("s")
    assert (status, reply.state, reply.body) == (200, "done", b"body")
    assert (reply.tokens_in, reply.tokens_out) == (2, 5)
    assert await caller.sample("s", wait=3.0) == (200, reply)
    assert await caller.get("/v1/samples/s?wait=1", SampleReply) == (200, reply)
    assert len(double.ran) == 1


async def test_a_sample_id_belongs_to_one_request(caller: Caller) -> None:
    await caller.sample("s")
    status, refusal = await caller.sample("s", seed=2)
    assert (status, refusal.error) == (422, "op_reused")


async def test_a_long_sample_is_polled(caller: Caller, double: EngineDouble) -> None:
    double.gate.clear()
    assert (await caller.sample("s", wait=0.0))[0] == 202
    assert (await caller.get("/v1/samples/s?wait=0.01", SampleReply))[1].state == "running"
    double.gate.set()
    assert (await caller.get("/v1/samples/s?wait=5", SampleReply))[0] == 200


@pytest.mark.parametrize(("error", "category"), [(UserError("bad"), "user"), (ValueError("x"), "server")])
async def test_a_failed_sample_is_an_answer(
    caller: Caller, double: EngineDouble, error: Exception, category: str
) -> None:
    double.fails = error
    status, reply = await caller.sample("s")
    assert (status, reply.state, reply.failure.category) == (200, "failed", category)


async def test_samples_queue_only_so_far(caller: Caller, double: EngineDouble) -> None:
    double.gate.clear()
    for number in range(TRAINER_QUEUE):
        assert (await caller.sample(f"s{number}", wait=0.0))[0] == 202
    status, refusal = await caller.sample("one more", wait=0.0)
    assert (status, refusal.error, refusal.retryable) == (429, "busy", True)
    assert (await caller.sample("s3", wait=0.0))[0] == 202, "a known one still joins"


async def test_old_answers_are_forgotten(double: EngineDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    from tink.trainer import samples

    async with serving(double) as caller:
        await caller.sample("old")
        monkeypatch.setattr(samples, "SAMPLE_KEEP_BYTES", 5)
        await caller.sample("new")
        assert (await caller.get("/v1/samples/old", SampleReply))[0] == 404
        assert (await caller.get("/v1/samples/new", SampleReply))[0] == 200
        monkeypatch.setattr(samples, "SAMPLE_KEEP_SECONDS", 0.0)
        assert (await caller.get("/v1/samples/new", SampleReply))[0] == 404


# -- the end, and the log -------------------------------------------------------------------------


async def test_stopping_lets_what_runs_end_and_starts_nothing(caller: Caller, double: EngineDouble) -> None:
    double.gate.clear()
    await caller.op(1, wait=0.0)
    await caller.op(2, wait=0.0)
    await caller.get("/v1/ops/m/1?wait=0.01", OpReply)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(caller.trainer.finish)
        await trio.testing.wait_all_tasks_blocked()
        double.gate.set()
    assert double.ran == [("m", "create")]


async def test_the_log_has_a_line_per_op_and_no_bodies(caller: Caller) -> None:
    with structlog.testing.capture_logs() as lines:
        await caller.op(1)
        await caller.op(2, ForwardBackward(b"the user's text"))
        await caller.sample("s", prompt=[123456])
    assert [(line["event"], line.get("op")) for line in lines] == [
        ("op", "CreateModel"),
        ("op", "ForwardBackward"),
        ("sample", None),
    ]
    assert "text" not in str(lines)
    assert "123456" not in str(lines)
