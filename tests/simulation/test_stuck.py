"""What is stuck, wrong or of another history, where time is simulated: what tests/crash/test_stuck.py shows
with real processes, and what needs minutes, other clocks or rarer answers."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from tests.simulation.cluster import TENANT, Cluster
from tests.simulation.doubles import Network, SimulatedTrainer, SimulatedWorld
from tests.simulation.scenario import batch, events, json, step
from tink.backends.endpoint import ExternalEndpoint
from tink.domain import messages
from tink.limits import SEQ_GAP_SECONDS, WRONG_ANSWERS
from tink.wire import tink_train

Answer = Callable[[httpx.Request], httpx.Response | None]
PROMPT = json(prompt={"chunks": [{"type": "encoded_text", "tokens": [1]}]})


async def _train(cluster: Cluster, model: str, first: int, last: int) -> list[object]:
    """The results of jobs `first` to `last`, one after the other; odd ones are batches, even ones steps."""
    results = []
    for seq in range(first, last + 1):
        job = await (batch if seq % 2 else step)(cluster, model, seq)
        outcome = await cluster.outcome(job)
        assert outcome.state == "done", outcome.error
        results.append(outcome.body or outcome.result)
    return results


async def _model(cluster: Cluster, number: int = 0) -> str:
    model = await cluster.create(await cluster.session(), number)
    await cluster.outcome(f"{model}:0")
    return model


async def _expected(folder: Path, last: int) -> list[object]:
    async with Cluster.running(folder) as cluster:
        return await _train(cluster, await _model(cluster), 1, last)


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], None]]:
    """From then on a call gets the answer that the function gives, or the trainer's if that is None. The
    trainer does what it was asked for all the same."""
    whole = Network.handle_async_request

    def begin(answer: Answer) -> None:
        async def handle(self: Network, request: httpx.Request) -> httpx.Response:
            right = await whole(self, request)
            return answer(request) or right

        monkeypatch.setattr(Network, "handle_async_request", handle)

    yield begin
    monkeypatch.undo()


def refusal(status: int, error: str) -> httpx.Response:
    return httpx.Response(status, content=tink_train.encode(tink_train.Refusal(error, f"it said {error}")))


# -- answers that are wrong -------------------------------------------------------------------------

REFUSALS = [
    (500, "failed"), (503, "broken"), (401, "unauthorized"), (404, "no_op"), (409, "fenced"),
    (410, "result_gone"), (412, "stale_incarnation"), (418, "a word of tomorrow"), (422, "op_reused"),
    (429, "busy"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "error"), REFUSALS, ids=[error for _, error in REFUSALS])
async def test_no_refusal_that_comes_once_fails_a_job(
    autojump_clock: MockClock, tmp_path: Path, answering: Any, status: int, error: str
) -> None:
    """The op was applied, and then refused: to take the refusal for its end would leave the journal and the
    trainer with two histories."""
    expected = await _expected(tmp_path / "one", 6)
    async with Cluster.running(tmp_path / "two") as cluster:
        model = await _model(cluster)
        left = 1

        def answer(request: httpx.Request) -> httpx.Response | None:
            nonlocal left
            if request.url.path == "/v1/ops" and left:
                left -= 1
                return refusal(status, error)
            return None

        results = await _train(cluster, model, 1, 2)
        answering(answer)
        assert results + await _train(cluster, model, 3, 6) == expected
        assert left == 0
        cluster.check_journal()


@pytest.mark.parametrize("op", ["train", "sample"])
@pytest.mark.parametrize("status", [200, 500])
async def test_a_job_that_is_answered_wrongly_for_ever_is_given_up_and_the_others_go_on(
    autojump_clock: MockClock, tmp_path: Path, answering: Any, op: str, status: int
) -> None:
    calls: list[float] = []
    async with Cluster.running(tmp_path) as cluster:
        model, neighbour = await _model(cluster), await _model(cluster)

        def answer(request: httpx.Request) -> httpx.Response | None:
            if b"deadly" not in request.content:
                return None
            calls.append(trio.current_time())
            return httpx.Response(status, content=b"\xc1garbage")

        answering(answer)
        if op == "train":
            await cluster.submit(model, 1, "forward_backward", b"deadly")
            job = f"{model}:1"
        else:
            session = await cluster.session()
            sampler = (
                await cluster.ask(messages.CreateSampler(TENANT, session, 0, base_model="sim/model"))
            ).id
            monkey = PROMPT.replace(b"[1]", b"[1,2]")
            job = (await cluster.ask(messages.SubmitSample(TENANT, sampler, 0, monkey))).request_id
            # Its prompt is what the network sees.
            answering(
                lambda request: answer(_deadly(request)) if request.url.path == "/v1/samples" else None
            )
        others = await _train(cluster, neighbour, 1, 6)
        outcome = await cluster.outcome(job)
        assert (outcome.state, outcome.category) == ("failed", "server")
        assert "3 times" in str(outcome.error)
        # The first answer of each life finds the op not applied, and does not count with the others.
        assert 3 * WRONG_ANSWERS <= len(calls) <= 3 * (WRONG_ANSWERS + 1)
        # Each life of the trainer gets a while, and the first calls come closer than the last.
        assert calls[WRONG_ANSWERS - 1] - calls[0] > 20.0
        assert await _train(cluster, model, 2, 3)
        assert len(set(map(str, others))) == 6
        cluster.check_journal()


def _deadly(request: httpx.Request) -> httpx.Request:
    return httpx.Request("POST", request.url, content=b"deadly")


async def test_a_server_that_is_well_and_cannot_say_what_it_holds_is_replaced(
    autojump_clock: MockClock, tmp_path: Path, answering: Any
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        model = await _model(cluster)
        lives, looks = cluster.trainer.lives, []

        def answer(request: httpx.Request) -> httpx.Response | None:
            if request.url.path == "/v1/state" and cluster.trainer.lives == lives:
                looks.append(trio.current_time())
                return httpx.Response(200, content=b"[]")
            return None

        answering(answer)
        cluster.crash_worker()
        await cluster.start_worker()
        assert len(await _train(cluster, model, 1, 2)) == 2
        assert cluster.trainer.lives == lives + 1
        assert len(looks) == WRONG_ANSWERS
        assert looks[-1] - looks[0] > 20.0


async def test_a_snapshot_that_says_another_number_is_not_one(
    autojump_clock: MockClock, tmp_path: Path, answering: Any
) -> None:
    def answer(request: httpx.Request) -> httpx.Response | None:
        if request.url.path == "/v1/snapshots":
            return httpx.Response(200, content=tink_train.encode(tink_train.SnapshotReply(99, [])))
        return None

    answering(answer)
    async with Cluster.running(tmp_path, snapshot_seconds=0.0) as cluster:
        with capture_logs() as lines:
            await _train(cluster, await _model(cluster), 1, 2)
        assert any(line["event"] == "no snapshot" for line in lines)
        with sqlite3.connect(cluster.home.journal) as journal:
            assert journal.execute("SELECT count(*) FROM snapshots").fetchone() == (0,)


# -- work that hangs --------------------------------------------------------------------------------


def _hang(monkeypatch: pytest.MonkeyPatch, what: str) -> list[float]:
    """The next thread with `what` in its arguments never comes back. When it was, once it was."""
    run_sync, hung = SimulatedWorld.run_sync, list[float]()

    async def once(self: SimulatedWorld, fn: Any, *args: Any, **kwargs: Any) -> Any:
        if what in repr((fn, *args)) and not hung:
            hung.append(trio.current_time())
            await trio.sleep_forever()
        return await run_sync(self, fn, *args, **kwargs)

    monkeypatch.setattr(SimulatedWorld, "run_sync", once)
    return hung


@pytest.mark.parametrize("what", ["ForwardBackward(", "OptimStep(", "HashEngine.snapshot"])
async def test_work_that_hangs_is_told_of_then_ended_and_redone(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    expected = await _expected(tmp_path / "one", 6)
    async with Cluster.running(tmp_path / "two", hang_seconds=400.0, snapshot_seconds=0.01) as cluster:
        model = await _model(cluster)
        results = await _train(cluster, model, 1, 2)
        hung = _hang(monkeypatch, what)
        with capture_logs() as lines, trio.fail_after(3600.0):
            results += await _train(cluster, model, 3, 6)
        assert results == expected
        assert 400.0 < trio.current_time() - hung[0] < 450.0
        assert [line["event"] for line in lines].count("no progress") == 1
        assert [line["event"] for line in lines].count("trainer is replaced") == 1
        cluster.check_journal()


async def test_a_server_of_somebody_elses_that_hangs_is_used_again_once_it_was_restarted(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await _expected(tmp_path / "one", 6)
    monkeypatch.setattr(SimulatedTrainer, "find", ExternalEndpoint("http://trainer.sim").find)
    async with Cluster.running(tmp_path / "two", hang_seconds=400.0) as cluster:
        model = await _model(cluster)
        results = await _train(cluster, model, 1, 2)
        hung = _hang(monkeypatch, "ForwardBackward(")

        async def restart() -> None:
            await trio.sleep(1000.0)
            health: messages.Health = await cluster.ask(messages.GetHealth(""))
            assert "another must take its place" in health.servers["trainer"]
            assert "TINK_HANG_SECONDS" in health.servers["trainer"]
            assert cluster.trainer.lives == 1
            cluster.trainer.kill()
            await cluster.start_trainer()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(restart)
            results += await _train(cluster, model, 3, 6)
        assert results == expected
        assert trio.current_time() - hung[0] > 900.0
        cluster.check_journal()


async def test_a_trainer_of_other_versions_than_before_is_told_of_and_journaled(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        model = await _model(cluster)
        await _train(cluster, model, 1, 2)
        cluster.trainer.kill()
        cluster.trainer.version = "2"
        with capture_logs() as lines:
            await cluster.start_trainer()
            await _train(cluster, model, 3, 4)
        told = [line for line in lines if line["event"] == "trainer has other versions than before"]
        assert [line["torch"] for line in told] == ["1 -> 2"]
        versions = [event["versions"] for event in events(cluster, "trainer_started")]
        assert versions == [{"torch": "1"}, {"torch": "2"}]


async def test_a_sample_that_hangs_is_run_again(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Cluster.running(tmp_path, hang_seconds=400.0) as cluster:
        session = await cluster.session()
        sampler = (await cluster.ask(messages.CreateSampler(TENANT, session, 0, base_model="sim/model"))).id
        _hang(monkeypatch, "SampleRequest(")
        job = (await cluster.ask(messages.SubmitSample(TENANT, sampler, 0, PROMPT))).request_id
        with trio.fail_after(3600.0):
            assert (await cluster.outcome(job)).state == "done"
        assert cluster.trainer.lives == 2


async def test_nothing_is_taken_for_hung_where_that_is_off(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Cluster.running(tmp_path, hang_seconds=0.0) as cluster:
        model = await _model(cluster)
        _hang(monkeypatch, "ForwardBackward(")
        await cluster.submit(model, 1, "forward_backward", b"x")
        await trio.sleep(3000.0)
        assert cluster.trainer.lives == 1


# -- another history --------------------------------------------------------------------------------


@pytest.mark.parametrize("backup", ["in this life of the worker", "in an earlier one", "none"])
async def test_a_trainer_that_is_ahead_of_a_restored_journal_is_replaced(
    autojump_clock: MockClock, tmp_path: Path, backup: str
) -> None:
    """What was journaled after the backup is gone; the trainer must not go on from there."""
    expected = await _expected(tmp_path / "one", 8)
    async with Cluster.running(tmp_path / "two") as cluster:
        model = await _model(cluster)
        results = await _train(cluster, model, 1, 4)
        copy = sqlite3.connect(tmp_path / "backup.sqlite")
        with sqlite3.connect(cluster.home.journal) as journal:
            journal.backup(copy)
        copy.close()
        if backup != "in this life of the worker":
            cluster.crash_worker()
            await cluster.start_worker()
        await _train(cluster, model, 5, 6)
        await cluster.submit(model, 7, "forward_backward", b"of another future")
        await cluster.outcome(f"{model}:7")
        cluster.crash_worker()
        for file in cluster.home.root.glob("journal.sqlite*"):
            file.unlink()
        if backup != "none":
            (tmp_path / "backup.sqlite").rename(cluster.home.journal)
        cluster.watch.backup_was_put_back()
        lives = cluster.trainer.lives
        with capture_logs() as lines:
            await cluster.start_worker()
            if backup == "none":
                results = await _train(cluster, await _model(cluster), 1, 8)
            else:
                results += await _train(cluster, model, 5, 8)
        assert results == expected
        assert cluster.trainer.lives == lives + 1
        assert any("ahead of the journal" in str(line.get("reason")) for line in lines)
        cluster.check_journal()


# -- clocks -----------------------------------------------------------------------------------------


async def test_a_worker_that_was_stopped_skips_no_number(autojump_clock: MockClock, tmp_path: Path) -> None:
    """Its clock has gone on and it has not: those who were to send the number had no time for it."""
    async with Cluster.running(tmp_path) as cluster:
        model = await _model(cluster)
        await step(cluster, model, 2)
        for _ in range(5):
            await trio.sleep(1.0)
            autojump_clock.jump(2 * SEQ_GAP_SECONDS)
        await batch(cluster, model, 1)
        assert (await cluster.outcome(f"{model}:1")).state == "done"
        assert (await cluster.outcome(f"{model}:2")).state == "done"


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the wall clock of every process forward by so much, or back. The monotonic one does not know."""
    now, shift = SimulatedWorld.now, [0.0]

    def jump(seconds: float) -> None:
        shift[0] += seconds

    monkeypatch.setattr(SimulatedWorld, "now", lambda self: now(self) + shift[0])
    return jump


DAY = 86400.0


@pytest.mark.parametrize("seconds", [-40 * 365 * DAY, -DAY, -1.0, DAY, 40 * 365 * DAY])
async def test_a_clock_that_is_set_changes_no_result_and_no_order(
    autojump_clock: MockClock, tmp_path: Path, set_clock: Callable[[float], None], seconds: float
) -> None:
    expected = await _expected(tmp_path / "one", 8)
    async with Cluster.running(tmp_path / "two", snapshot_seconds=0.05) as cluster:
        model = await _model(cluster)
        results = await _train(cluster, model, 1, 4)
        began = trio.current_time()
        set_clock(seconds)
        results += await _train(cluster, model, 5, 6)
        cluster.trainer.kill()
        cluster.crash_worker()
        set_clock(-2 * seconds if seconds < 0 else -seconds / 2)
        await cluster.start_trainer()
        await cluster.start_worker()
        # Sessions have no time to live: the client of this one goes on.
        await cluster.router_ask(messages.Heartbeat(TENANT, model.partition(":")[0]))
        results += await _train(cluster, model, 7, 8)
        assert results == expected
        assert trio.current_time() - began < 60.0
        cluster.check_journal()
        with sqlite3.connect(cluster.home.journal) as journal:
            times = [at for (at,) in journal.execute("SELECT at FROM events ORDER BY seq")]
            assert times != sorted(times), "seq is the order of events, and `at` what the clock said"
            kinds = [kind for (kind,) in journal.execute("SELECT kind FROM events ORDER BY seq")]
        assert "seq_skipped" not in kinds


@pytest.mark.parametrize(("seconds", "left"), [(-DAY, True), (3000.0, True), (DAY, False)])
async def test_the_time_to_live_of_a_checkpoint_is_by_the_clock(
    autojump_clock: MockClock,
    tmp_path: Path,
    set_clock: Callable[[float], None],
    seconds: float,
    left: bool,
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        model = await _model(cluster)
        save = json(model_id=model, seq_id=1, path="one", ttl_seconds=3600)
        await cluster.submit(model, 1, "save_weights", save)
        await cluster.outcome(f"{model}:1")
        set_clock(seconds)
        await trio.sleep(120.0)
        assert len(await cluster.ask(messages.ListCheckpoints(TENANT, model))) == left
        cluster.check_journal()
