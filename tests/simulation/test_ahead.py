"""Operations that are at the training server before their turn."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec
import pytest
import trio
from trio.testing import MockClock

from tests.simulation.cluster import Cluster
from tests.simulation.doubles import Network
from tests.simulation.scenario import answers, batch, crash_and_restart, events, json, slow, step, train
from tink.actors.jobs import Jobs
from tink.wire import tink_train

OP_SECONDS = 5.0


class Call(NamedTuple):
    began: float
    ended: float
    status: int
    op: tink_train.OpRequest


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The operations that were sent, in the order in which they were answered; those that have a body take
    a while."""
    found: list[Call] = []
    handle = Network.handle_async_request

    async def listening(self: Network, request: httpx.Request) -> httpx.Response:
        began, answer = trio.current_time(), await handle(self, request)
        if request.method == "POST" and request.url.path == "/v1/ops":
            op = msgspec.msgpack.decode(request.content, type=tink_train.OpRequest)
            found.append(Call(began, trio.current_time(), answer.status_code, op))
        return answer

    monkeypatch.setattr(Network, "handle_async_request", listening)
    slow(monkeypatch, OP_SECONDS, lambda arguments: "ForwardBackward(" in arguments)
    return found


def _ops(calls: list[Call]) -> list[Call]:
    return [call for call in calls if isinstance(call.op.op, tink_train.ForwardBackward)]


async def _models(cluster: Cluster, count: int) -> list[str]:
    session = await cluster.session()
    models = [await cluster.create(session, number) for number in range(count)]
    for model in models:
        await cluster.outcome(f"{model}:0")
    return models


def _course(cluster: Cluster) -> list[tuple[str, str]]:
    """(kind, job) of what began and ended."""
    with closing(sqlite3.connect(cluster.home.journal)) as journal:
        kinds = "('job_started', 'job_done', 'job_failed')"
        found = journal.execute(f"SELECT kind, job_id FROM events WHERE kind IN {kinds} ORDER BY seq")
        return found.fetchall()


def _begun(cluster: Cluster) -> int:
    """How many jobs have begun and not ended."""
    return sum(1 if kind == "job_started" else -1 for kind, _ in _course(cluster))


@pytest.mark.parametrize("models", [1, 3])
async def test_the_next_operation_is_at_the_server_before_the_present_one_ends(
    autojump_clock: MockClock, tmp_path: Path, calls: list[Call], models: int
) -> None:
    async with Cluster.running(tmp_path, max_workers=1) as cluster:
        made = await _models(cluster, models)
        sent = [await batch(cluster, model, seq) for seq in (1, 2, 3) for model in made]
        await answers(cluster, sent)
        cluster.check_journal()
        idle = [job["idle_ms"] for job in events(cluster, "job_done")[models + 1 :]]
    first, *others = _ops(calls)
    # The first one has nothing before it, and behind the first of its life nothing is sent.
    for before, call in zip([first, *others], others, strict=False):
        assert call.began < before.ended or before is first
        assert call.status == 200
    assert sorted(idle)[-2] == 0.0
    assert max(idle) < 1000


async def test_one_is_ahead_and_no_more(
    autojump_clock: MockClock, tmp_path: Path, calls: list[Call]
) -> None:
    async with Cluster.running(tmp_path, max_workers=1) as cluster:
        models = await _models(cluster, 5)
        for model in models:
            for seq in (1, 2, 3):
                await batch(cluster, model, seq)
        begun = []
        for _ in range(10):
            await trio.sleep(OP_SECONDS)
            begun.append(_begun(cluster))
    assert max(begun) == 2
    assert begun.count(2) > 7


async def test_nothing_goes_ahead_of_what_cannot(
    autojump_clock: MockClock, tmp_path: Path, calls: list[Call]
) -> None:
    """A save has names to look up, a removal is the end: both have their turn first, and so has what is
    behind a removal."""
    async with Cluster.running(tmp_path, max_workers=1) as cluster:
        (model,) = await _models(cluster, 1)
        first = await batch(cluster, model, 1)
        save = (await cluster.submit(model, 2, "save_weights", json(model_id=model, path="a"))).request_id
        unload = (await cluster.submit(model, 3, "unload_model", json(model_id=model))).request_id
        late = await batch(cluster, model, 4)
        found = await answers(cluster, [first, save, unload, late])
        cluster.check_journal()
        order = _course(cluster)
    assert "was unloaded" in str(found[3])
    for before, after in ((first, save), (save, unload)):
        assert order.index(("job_done", before)) < order.index(("job_started", after))
    assert ("job_started", late) not in order


@pytest.mark.parametrize("with_steps", [False, True])
async def test_what_goes_ahead_changes_no_result_and_no_order(
    autojump_clock: MockClock,
    tmp_path: Path,
    calls: list[Call],
    monkeypatch: pytest.MonkeyPatch,
    with_steps: bool,
) -> None:
    async def run(folder: str) -> tuple[list[str], list[object]]:
        """The operations in their order, model by model, and the results."""
        calls.clear()
        async with Cluster.running(tmp_path / folder, max_workers=1) as cluster:
            models = await _models(cluster, 3)
            sent = []
            for model, count in zip(models, (4, 1, 2), strict=True):
                for seq in range(1, 2 * count, 2):
                    sent += [await batch(cluster, model, seq)]
                    sent += [await (step if with_steps else batch)(cluster, model, seq + 1)]
            found = await answers(cluster, sent)
            cluster.check_journal()
        order = [call.op.job_id.partition(":")[2] for call in calls]
        return sorted(order, key=lambda job_id: job_id.rpartition(":")[0]), found

    with monkeypatch.context() as without:
        without.setattr(Jobs, "coming", lambda self: [])
        expected = await run("without")
    assert await run("with") == expected


@pytest.mark.parametrize("victim", ["worker", "trainer", "both"])
async def test_a_crash_with_an_operation_ahead_changes_no_result(
    autojump_clock: MockClock, tmp_path: Path, calls: list[Call], victim: str
) -> None:
    async def run(folder: str, *, crash: bool) -> list[object]:
        async with Cluster.running(tmp_path / folder, max_workers=1) as cluster:
            (model,) = await _models(cluster, 1)
            sent = await train(cluster, model, 1, 4)
            if crash:
                await trio.sleep(1.5 * OP_SECONDS)
                assert _begun(cluster) == 2
                await crash_and_restart(cluster, victim)
            found = await answers(cluster, sent)
            cluster.check_journal()
            return found

    assert await run("crashed", crash=True) == await run("undisturbed", crash=False)


async def test_a_job_that_was_ahead_of_anothers_death_has_all_its_attempts(
    autojump_clock: MockClock, tmp_path: Path, calls: list[Call]
) -> None:
    async with Cluster.running(tmp_path, max_workers=1, max_attempts=1) as cluster:
        (model,) = await _models(cluster, 1)
        sent = [await batch(cluster, model, seq) for seq in (1, 2, 3)]
        await trio.sleep(1.5 * OP_SECONDS)
        assert _begun(cluster) == 2
        cluster.trainer.kill()
        await cluster.start_trainer()
        found = await answers(cluster, sent)
        cluster.check_journal()
    assert [isinstance(one, bytes) for one in found] == [True, False, True]


async def _break(request: httpx.Request) -> httpx.Response:
    raise httpx.WriteError("connection reset", request=request)


async def _know_nothing(request: httpx.Request) -> httpx.Response:
    return httpx.Response(404, text="Not Found", request=request)


@pytest.mark.parametrize("way", [_break, _know_nothing])
async def test_a_call_ahead_that_is_lost_is_made_again(
    autojump_clock: MockClock,
    tmp_path: Path,
    calls: list[Call],
    monkeypatch: pytest.MonkeyPatch,
    way: Callable[[httpx.Request], Awaitable[httpx.Response]],
) -> None:
    handle, tried = Network.handle_async_request, set[str]()

    async def lossy(self: Network, request: httpx.Request) -> httpx.Response:
        if request.method == "POST" and request.url.path == "/v1/ops":
            op = msgspec.msgpack.decode(request.content, type=tink_train.OpRequest)
            if op.acked < op.op_no - 1 and op.job_id not in tried:
                tried.add(op.job_id)
                return await way(request)
        return await handle(self, request)

    monkeypatch.setattr(Network, "handle_async_request", lossy)
    async with Cluster.running(tmp_path, max_workers=1) as cluster:
        (model,) = await _models(cluster, 1)
        found = await answers(cluster, [await batch(cluster, model, seq) for seq in (1, 2, 3, 4)])
        cluster.check_journal()
        assert {one["attempt"] for one in events(cluster, "job_started")} == {1}
    assert all(isinstance(one, bytes) for one in found)
    assert len(tried) == 3


async def test_how_long_jobs_and_the_trainer_waited_is_journaled(
    autojump_clock: MockClock, tmp_path: Path, calls: list[Call]
) -> None:
    async with Cluster.running(tmp_path, max_workers=1) as cluster:
        (model,) = await _models(cluster, 1)
        await answers(cluster, [await batch(cluster, model, 1)])
        await trio.sleep(60.0)
        sent = [await batch(cluster, model, seq) for seq in (2, 3)]
        await answers(cluster, sent)
        cluster.check_journal()
        assert cluster.journal is not None
        first, second = [await cluster.journal.job(job) for job in sent]
    assert first is not None
    assert second is not None
    # Nobody had asked for anything; and then the one waited for the other, at the server.
    assert 60_000 <= first.idle_ms < 61_000
    assert second.idle_ms == 0
    assert first.queue_ms < 1000
    assert second.started_at - second.submitted_at < 1.0
    assert second.queue_ms == pytest.approx(OP_SECONDS * 1000, rel=0.1)
