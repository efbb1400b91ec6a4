"""Operations that are ahead of their turn when something goes wrong: what is journaled is what would be
without them, and who is not to blame does not pay."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio
from trio.testing import MockClock

from tests.simulation.cluster import Cluster
from tests.simulation.doubles import Network
from tests.simulation.scenario import answers, batch, events, slow, step, train
from tink.actors.jobs import INTERNAL
from tink.actors.snapshots import Snapshots
from tink.domain import plans
from tink.wire import tink_train

Send = Callable[[], Awaitable[httpx.Response]]
OP_SECONDS = 5.0


def on_the_way(
    monkeypatch: pytest.MonkeyPatch,
    what: Callable[[Network, tink_train.OpRequest, Send], Awaitable[httpx.Response]],
) -> None:
    """Every operation that is sent goes by way of `what`."""
    handle = Network.handle_async_request

    async def meeting(self: Network, request: httpx.Request) -> httpx.Response:
        if request.method != "POST" or request.url.path != "/v1/ops":
            return await handle(self, request)
        op = msgspec.msgpack.decode(request.content, type=tink_train.OpRequest)
        return await what(self, op, lambda: handle(self, request))

    monkeypatch.setattr(Network, "handle_async_request", meeting)


async def _models(cluster: Cluster, count: int) -> list[str]:
    session = await cluster.session()
    models = [await cluster.create(session, number) for number in range(count)]
    await answers(cluster, [f"{model}:0" for model in models])
    return models


@pytest.fixture(autouse=True)
def _batches_take_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, OP_SECONDS, lambda arguments: "ForwardBackward(" in arguments)


async def test_an_answer_from_a_life_that_is_gone_counts_for_nothing(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch's answer is lost, that of the step behind it arrives, the server dies, and the batch is
    given up: the step was made with its gradient, and must not have been."""
    answered, died = trio.Event(), False

    async def cut(network: Network, op: tink_train.OpRequest, send: Send) -> httpx.Response:
        nonlocal died
        answer = await send()
        if not died and op.job_id.endswith(":3"):
            await answered.wait()
            died = True
            network.trainer.kill()
            raise httpx.ReadError("connection reset")
        if op.job_id.endswith(":4"):
            answered.set()
        return answer

    on_the_way(monkeypatch, cut)
    async with Cluster.running(tmp_path, max_workers=1, max_attempts=1) as cluster:
        (model,) = await _models(cluster, 1)
        await answers(cluster, await train(cluster, model, 1, 1))
        sent = await train(cluster, model, 3, 2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cluster.keep_trainer_alive)
            found = await answers(cluster, sent)
            nursery.cancel_scope.cancel()
        cluster.check_journal()
        assert died
        assert "died 1 times" in str(found[0])
        assert not any(isinstance(one, str) for one in found[1:])
        assert events(cluster, "diverged") == []


async def test_a_bug_that_a_job_meets_ahead_fails_it_in_its_turn_and_nobody_else(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = plans.training

    def buggy(job: Any, body: bytes, *rest: Any) -> plans.Plan:
        if body == b"batch 3":
            raise KeyError("a bug")
        return training(job, body, *rest)

    monkeypatch.setattr(plans, "training", buggy)
    async with Cluster.running(tmp_path, max_workers=1) as cluster:
        one, other = await _models(cluster, 2)
        sent = [await batch(cluster, model, seq) for seq in (1, 2, 3, 4) for model in (one, other)]
        found = await answers(cluster, sent)
        cluster.check_journal()
        assert [one == INTERNAL for one in found] == [False] * 4 + [True] * 2 + [False] * 2
        assert {one["attempt"] for one in events(cluster, "job_started")} == {1}


async def test_a_snapshot_waits_for_no_other_models_operation(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch, 700.0, lambda arguments: "Forward(" in arguments)
    async with Cluster.running(tmp_path, max_workers=1, snapshot_seconds=8) as cluster:
        one, other = await _models(cluster, 2)
        sent = [job for seq in (1, 3, 5, 7) for job in await train(cluster, one, seq, 1)]
        others = [await cluster.submit(other, seq, "forward", b"batch") for seq in (1, 2, 3, 4)]
        await answers(cluster, sent + [promise.request_id for promise in others])
        await trio.sleep(1)
        cluster.check_journal()
        taken = {event["directory"] for event in events(cluster, "snapshot_taken")}
        assert len(taken) >= 2
        assert taken >= _snapshots(cluster)


async def test_an_answer_that_is_there_waits_for_no_other_models_operation(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch, 600.0, lambda arguments: "a long batch" in arguments)
    async with Cluster.running(tmp_path, max_workers=1) as cluster:
        one, other = await _models(cluster, 2)
        await answers(cluster, [await batch(cluster, one, 1)])
        sent = [await batch(cluster, one, seq) for seq in (2, 3)]
        await trio.sleep(1)
        await cluster.submit(other, 1, "forward_backward", b"a long batch")
        with trio.fail_after(3 * OP_SECONDS):
            await answers(cluster, sent)
        cluster.check_journal()


async def test_who_runs_while_one_arrives_that_kills_the_server_has_not_done_it(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path, max_workers=1, max_attempts=1) as cluster:
        (model,) = await _models(cluster, 1)
        await answers(cluster, [await batch(cluster, model, 1)])
        cluster.trainer.deadly = b"batch 3"
        sent = [await batch(cluster, model, seq) for seq in (2, 3, 4)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cluster.keep_trainer_alive)
            found = await answers(cluster, sent)
            nursery.cancel_scope.cancel()
        cluster.check_journal()
    assert [isinstance(one, bytes) for one in found] == [True, False, True]
    assert "died 1 times" in str(found[1])


async def test_a_step_that_overtakes_its_batch_on_the_way_is_sent_again_and_there_in_time(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def upload(network: Network, op: tink_train.OpRequest, send: Send) -> httpx.Response:
        if isinstance(op.op, tink_train.ForwardBackward):
            await trio.sleep(0.5)
        return await send()

    on_the_way(monkeypatch, upload)
    async with Cluster.running(tmp_path, max_workers=1) as cluster:
        (model,) = await _models(cluster, 1)
        await answers(cluster, await train(cluster, model, 1, 1))
        for seq in range(3, 13, 2):
            await trio.sleep(1)
            await answers(cluster, await train(cluster, model, seq, 1))
        cluster.check_journal()
        steps = [event for event in events(cluster, "job_done") if event["learning_rate"] is not None]
        assert [event["idle_ms"] for event in steps[1:]] == [0.0] * 5


async def test_a_call_that_is_lost_ahead_makes_nobody_do_anything_again(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent_ahead: set[str] = set()

    async def lose(network: Network, op: tink_train.OpRequest, send: Send) -> httpx.Response:
        if op.acked < op.op_no - 1 and op.job_id not in sent_ahead:
            sent_ahead.add(op.job_id)
            raise httpx.WriteError("connection reset")
        return await send()

    on_the_way(monkeypatch, lose)
    async with Cluster.running(tmp_path, max_workers=1) as cluster:
        (model,) = await _models(cluster, 1)
        sent = [await batch(cluster, model, seq) for seq in (1, 2, 3, 4)]
        sent += [await step(cluster, model, 5)]
        await answers(cluster, sent)
        cluster.check_journal()
        assert sent_ahead
        assert events(cluster, "redone") == []


async def test_behind_a_restart_no_snapshot_is_taken_of_what_has_not_ended(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Cluster.running(tmp_path, max_workers=1, snapshot_seconds=1) as cluster:
        (model,) = await _models(cluster, 1)
        with monkeypatch.context() as patch:
            patch.setattr(Snapshots, "_limit", lambda self, job: 1e12)
            await answers(cluster, [await batch(cluster, model, 1)])
            sent = [await batch(cluster, model, seq) for seq in (2, 3, 4)]
            await trio.sleep(1.5 * OP_SECONDS)
            cluster.crash_worker()
        await cluster.start_worker()
        await answers(cluster, sent)
        cluster.check_journal()
        assert _snapshots(cluster) == {event["directory"] for event in events(cluster, "snapshot_taken")}


def _snapshots(cluster: Cluster) -> set[str]:
    """The directories that there are."""
    root = cluster.settings.artifact_root
    found = root.rglob("*-snapshot/manifest.json")
    return {path.parent.relative_to(root).as_posix() for path in found}
