"""Bodies that go to the training server ahead of their operations."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec
import pytest
import trio
from trio.testing import MockClock

from tests.simulation.cluster import Cluster
from tests.simulation.doubles import Network
from tests.simulation.scenario import answers, batch, events, slow, step, train
from tink.limits import AHEAD_JOBS_PER_SLOT
from tink.trainer import trainer
from tink.wire import tink_train

OP_SECONDS = 5.0


class Call(NamedTuple):
    """`op`: None for a body that goes ahead."""

    began: float
    ended: float
    status: int
    digest: str
    op: tink_train.OpRequest | None


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The operations and bodies that were sent, in the order in which they were answered; the operations
    that have a body take a while."""
    found: list[Call] = []
    handle = Network.handle_async_request

    async def listening(self: Network, request: httpx.Request) -> httpx.Response:
        began, answer = trio.current_time(), await handle(self, request)
        status, ended = answer.status_code, trio.current_time()
        if request.method == "PUT":
            found.append(Call(began, ended, status, request.url.path.rpartition("/")[2], None))
        elif request.method == "POST" and request.url.path == "/v1/ops":
            op = msgspec.msgpack.decode(request.content, type=tink_train.OpRequest)
            digest = getattr(op.op, "body_sha256", None) or ""
            found.append(Call(began, ended, status, digest, op))
        return answer

    monkeypatch.setattr(Network, "handle_async_request", listening)
    slow(monkeypatch, OP_SECONDS, lambda arguments: "ForwardBackward(" in arguments)
    return found


def _ops(calls: list[Call]) -> list[Call]:
    return [call for call in calls if call.op and isinstance(call.op.op, tink_train.ForwardBackward)]


async def _models(cluster: Cluster, count: int) -> list[str]:
    session = await cluster.session()
    models = [await cluster.create(session, number) for number in range(count)]
    for model in models:
        await cluster.outcome(f"{model}:0")
    return models


async def _batch(cluster: Cluster, model: str, seq: int) -> str:
    """As the SDK's, no two models' bodies are the same."""
    body = f"batch {seq} of {model.rpartition(':')[2]}"
    return (await cluster.submit(model, seq, "forward_backward", body.encode())).request_id


@pytest.mark.parametrize("models", [1, 3])
async def test_the_next_body_is_at_the_server_before_the_present_op_ends(
    autojump_clock: MockClock, tmp_path: Path, calls: list[Call], models: int
) -> None:
    async with Cluster.running(tmp_path, max_workers=1) as cluster:
        made = await _models(cluster, models)
        jobs = [await _batch(cluster, model, seq) for seq in (1, 2, 3) for model in made]
        await answers(cluster, jobs)
        cluster.check_journal()
    arrived = {call.digest: call.ended for call in calls if call.op is None}
    first, *others = _ops(calls)
    assert first.op.op.body != b""
    for before, call in zip([first, *others], others, strict=False):
        assert (call.status, call.op.op.body) == (200, b"")
        assert arrived[call.digest] < before.ended
        assert before.ended <= call.began


async def test_a_step_between_two_batches_does_not_hide_the_second(
    autojump_clock: MockClock, tmp_path: Path, calls: list[Call]
) -> None:
    async with Cluster.running(tmp_path, max_workers=1) as cluster:
        (model,) = await _models(cluster, 1)
        await answers(cluster, await train(cluster, model, 1, 3))
    first, *others = _ops(calls)
    arrived = {call.digest: call.ended for call in calls if call.op is None}
    for before, call in zip([first, *others], others, strict=False):
        assert arrived[call.digest] < before.ended


async def test_a_body_that_was_lost_on_the_way_is_sent_with_its_op(
    autojump_clock: MockClock, tmp_path: Path, calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tink.trainer.bodies.TRAINER_BODIES", 0)
    async with Cluster.running(tmp_path, max_workers=1) as cluster:
        (model,) = await _models(cluster, 1)
        jobs = [await batch(cluster, model, seq) for seq in (1, 2)]
        assert all(isinstance(answer, bytes) for answer in await answers(cluster, jobs))
        cluster.check_journal()
        assert [one["attempt"] for one in events(cluster, "job_started")] == [1, 1, 1]
    _, named, carried = _ops(calls)
    assert (named.status, named.op.op.body) == (404, b"")
    assert (carried.status, carried.op.op.body) == (200, b"batch 2")
    assert carried.began - named.ended < 0.1  # at once: nothing is wrong with the server


async def test_a_server_that_keeps_no_bodies_is_sent_none(
    autojump_clock: MockClock, tmp_path: Path, calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "BODIES", "something else")
    async with Cluster.running(tmp_path, max_workers=1) as cluster:
        (model,) = await _models(cluster, 1)
        await answers(cluster, [await batch(cluster, model, seq) for seq in (1, 2, 3)])
    assert all(call.op is not None for call in calls)
    assert [call.op.op.body for call in _ops(calls)] == [b"batch 1", b"batch 2", b"batch 3"]


async def test_bodies_ahead_never_change_what_runs_or_in_which_order(
    autojump_clock: MockClock, tmp_path: Path, calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(folder: str) -> tuple[list[str], list[object]]:
        calls.clear()
        async with Cluster.running(tmp_path / folder, max_workers=1) as cluster:
            models = await _models(cluster, 3)
            jobs = []
            for model, count in zip(models, (4, 1, 2), strict=True):
                for seq in range(1, 2 * count, 2):
                    jobs += [await _batch(cluster, model, seq), await step(cluster, model, seq + 1)]
            found = await answers(cluster, jobs)
            cluster.check_journal()
        return [call.op.job_id.partition(":")[2] for call in calls if call.op], found

    with monkeypatch.context() as without:
        without.setattr(trainer, "BODIES", "something else")
        expected = await run("without")
    assert await run("with") == expected
    assert any(call.op is None for call in calls)


async def _hang(request: httpx.Request) -> httpx.Response:
    await trio.sleep_forever()
    raise AssertionError


async def _break(request: httpx.Request) -> httpx.Response:
    raise httpx.WriteError("connection reset", request=request)


async def _know_nothing(request: httpx.Request) -> httpx.Response:
    return httpx.Response(404, text="Not Found", request=request)


@pytest.mark.parametrize("way", [_hang, _break, _know_nothing])
async def test_a_body_that_does_not_arrive_delays_nothing(
    autojump_clock: MockClock,
    tmp_path: Path,
    calls: list[Call],
    monkeypatch: pytest.MonkeyPatch,
    way: Callable[[httpx.Request], Awaitable[httpx.Response]],
) -> None:
    handle, tried = Network.handle_async_request, list[str]()

    async def lossy(self: Network, request: httpx.Request) -> httpx.Response:
        if request.method != "PUT":
            return await handle(self, request)
        tried.append(request.url.path)
        return await way(request)

    monkeypatch.setattr(Network, "handle_async_request", lossy)
    async with Cluster.running(tmp_path, max_workers=1) as cluster:
        (model,) = await _models(cluster, 1)
        await answers(cluster, [await batch(cluster, model, seq) for seq in (1, 2, 3, 4)])
    ops = _ops(calls)
    assert [call.op.op.body for call in ops] == [f"batch {seq}".encode() for seq in (1, 2, 3, 4)]
    assert ops[-1].ended - ops[0].began < 4 * (OP_SECONDS + 1)
    # Each is given up when its turn comes, so that the next can be tried.
    assert len(tried) == len(set(tried)) == 3


async def test_so_many_bodies_are_sent_ahead_and_no_more(
    autojump_clock: MockClock, tmp_path: Path, calls: list[Call]
) -> None:
    async with Cluster.running(tmp_path, max_workers=1) as cluster:
        models = await _models(cluster, 5)
        for model in models:
            await batch(cluster, model, 1)
        await trio.sleep(OP_SECONDS / 2)
        assert sum(call.op is None for call in calls) == AHEAD_JOBS_PER_SLOT


@pytest.mark.parametrize("victim", ["worker", "trainer"])
async def test_a_crash_with_bodies_ahead_changes_no_result(
    autojump_clock: MockClock, tmp_path: Path, calls: list[Call], victim: str
) -> None:
    async def run(folder: str, *, crash: bool) -> list[object]:
        async with Cluster.running(tmp_path / folder, max_workers=1) as cluster:
            (model,) = await _models(cluster, 1)
            jobs = await train(cluster, model, 1, 4)
            if crash:
                await trio.sleep(OP_SECONDS / 2)
                assert calls[-1].op is None
                if victim == "worker":
                    cluster.crash_worker()
                    await cluster.start_worker()
                else:
                    cluster.trainer.kill()
                    await cluster.start_trainer()
            found = await answers(cluster, jobs)
            cluster.check_journal()
            return found

    assert await run("crashed", crash=True) == await run("undisturbed", crash=False)


async def test_how_long_jobs_and_the_trainer_waited_is_journaled(
    autojump_clock: MockClock, tmp_path: Path, calls: list[Call]
) -> None:
    async with Cluster.running(tmp_path, max_workers=1) as cluster:
        (model,) = await _models(cluster, 1)
        await trio.sleep(60.0)
        jobs = [await batch(cluster, model, seq) for seq in (1, 2)]
        await answers(cluster, jobs)
        cluster.check_journal()
        assert cluster.journal is not None
        first, second = [await cluster.journal.job(job) for job in jobs]
    assert first is not None
    assert second is not None
    for job in (first, second):
        assert job.queue_ms == pytest.approx((job.started_at - job.submitted_at) * 1000, abs=100)
    # Nobody had asked for anything; and then the trainer waited for the worker alone.
    assert 60_000 <= first.idle_ms < 61_000
    assert 0 < second.idle_ms < 1000 < second.queue_ms
