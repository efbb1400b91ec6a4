"""What the worker promises, each in a world where time is simulated and faults are chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from tests.simulation.cluster import TENANT, Cluster
from tests.simulation.doubles import HashEngine, TrainerWorld
from tests.simulation.scenario import answers, batch, events, json, long_run, slow, step, train
from tink.domain import ids, messages, rows
from tink.errors import NotFound, Overloaded
from tink.limits import SEQ_GAP_SECONDS


async def _undisturbed(folder: Path, steps: int) -> list[object]:
    async with Cluster.running(folder / "undisturbed") as cluster:
        model = await cluster.create(await cluster.session())
        return await answers(cluster, await train(cluster, model, 1, steps))


async def test_jobs_run_in_the_order_of_their_numbers_whatever_the_order_of_arrival(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    expected = await _undisturbed(tmp_path, 2)
    async with Cluster.running(tmp_path / "shuffled") as cluster:
        model = await cluster.create(await cluster.session())
        for seq in (3, 4, 2):
            await (batch if seq % 2 else step)(cluster, model, seq)
        await batch(cluster, model, 1)
        assert await answers(cluster, [ids.job_id(model, seq) for seq in (1, 2, 3, 4)]) == expected


async def test_a_repeat_finds_the_first_job_whatever_its_body(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        model = await cluster.create(await cluster.session())
        first = await cluster.submit(model, 1, "forward_backward", b"batch 1")
        second = await cluster.submit(model, 1, "forward_backward", b"another body")
        result = await cluster.outcome(first.request_id)
        third = await cluster.submit(model, 1, "forward_backward", b"a third")
        assert first == second == third
        assert await cluster.outcome(third.request_id) == result
        cluster.check_journal()


async def test_two_submissions_at_once_make_one_job(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with Cluster.running(tmp_path) as cluster:
        model = await cluster.create(await cluster.session())
        promises: list[messages.Promise] = []

        async def submit() -> None:
            promises.append(await cluster.submit(model, 1, "forward_backward", b"batch 1"))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(submit)
        assert len(set(promises)) == 1
        await cluster.outcome(promises[0].request_id)
        cluster.check_journal()


async def test_a_number_that_never_comes_does_not_stop_the_lane(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        model = await cluster.create(await cluster.session())
        await cluster.outcome(f"{model}:0")
        before = trio.current_time()
        await cluster.submit(model, 3, "forward_backward", b"batch 3")
        assert (await cluster.outcome(f"{model}:3")).state == "done"
        assert trio.current_time() - before >= SEQ_GAP_SECONDS

        await cluster.submit(model, 2, "forward_backward", b"batch 2, too late")
        late = await cluster.outcome(f"{model}:2")
        assert (late.state, late.category) == ("failed", "user")
        assert "skipped" in str(late.error)
        cluster.check_journal()


async def test_numbers_that_came_out_of_order_leave_no_task_behind(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """A worker that lives for weeks sees it at almost every step: a client sends one as a whole."""
    async with Cluster.running(tmp_path) as cluster:
        living = []
        for _ in range(4):
            model = await cluster.create(await cluster.session())
            await cluster.submit(model, 2, "forward_backward", b"second")
            await cluster.submit(model, 1, "forward_backward", b"first")
            assert (await cluster.outcome(f"{model}:2")).state == "done"
            await trio.testing.wait_all_tasks_blocked()
            living.append(trio.lowlevel.current_statistics().tasks_living)
        assert living == living[:1] * 4


async def test_a_failed_job_consumes_its_number_and_the_next_one_runs(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        model = await cluster.create(await cluster.session())
        await cluster.submit(model, 1, "forward_backward", b"poison")
        await cluster.submit(model, 2, "forward_backward", b"batch 2")
        failed = await cluster.outcome(f"{model}:1")
        assert (failed.state, failed.category, failed.error) == ("failed", "user", "poison")
        assert (await cluster.outcome(f"{model}:2")).state == "done"


async def test_a_request_that_could_not_be_decoded_fails_in_its_turn(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        model = await cluster.create(await cluster.session())
        broken = messages.SubmitTraining(
            TENANT,
            op="forward_backward",
            session_id=model.partition(":")[0],
            model_id=model,
            seq_id=1,
            body=b"",
            invalid="the body is cut off",
        )
        await cluster.ask(broken)
        await cluster.submit(model, 2, "forward_backward", b"batch 2")
        assert (await cluster.outcome(f"{model}:1")).error == "the body is cut off"
        assert (await cluster.outcome(f"{model}:2")).state == "done"


async def test_a_model_whose_creation_fails_does_not_exist(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        model = await cluster.create(await cluster.session(), rank=0)
        failed = await cluster.outcome(f"{model}:0")
        assert "rank 0" in str(failed.error)
        with pytest.raises(NotFound):
            await cluster.router_ask(messages.GetModel(TENANT, model))


async def test_another_tenant_sees_nothing(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with Cluster.running(tmp_path) as cluster:
        session = await cluster.session()
        model = await cluster.create(session)
        await cluster.outcome(f"{model}:0")
        for question in (
            messages.Heartbeat("other", session),
            messages.GetSession("other", session),
            messages.GetModel("other", model),
            messages.AwaitOutcome("other", f"{model}:0"),
            messages.CancelJob("other", f"{model}:0"),
            messages.SubmitTraining(
                "other", op="forward", session_id=session, model_id=model, seq_id=1, body=b"x"
            ),
            messages.CreateSampler("other", session, 0, base_model="sim/model"),
        ):
            with pytest.raises(NotFound):
                await cluster.router_ask(question)


@pytest.mark.parametrize("victim", ["worker", "trainer", "both"])
async def test_a_crash_changes_no_result(autojump_clock: MockClock, tmp_path: Path, victim: str) -> None:
    expected = await _undisturbed(tmp_path, 6)
    async with Cluster.running(tmp_path / "crashed") as cluster:
        model = await cluster.create(await cluster.session())
        jobs = await train(cluster, model, 1, 3)
        await cluster.outcome(jobs[2])
        if victim in ("trainer", "both"):
            cluster.trainer.kill()
        if victim in ("worker", "both"):
            cluster.crash_worker()
            await cluster.start_worker()
        if victim in ("trainer", "both"):
            await cluster.start_trainer()
        jobs += await train(cluster, model, 7, 3)
        assert await answers(cluster, jobs) == expected
        cluster.check_journal()


async def test_a_trainer_that_came_back_and_still_loads_its_model_is_waited_for(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        session = await cluster.session()
        model = await cluster.create(session)
        sampler = (await cluster.ask(messages.CreateSampler(TENANT, session, 0, base_model="sim/model"))).id
        await cluster.outcome(f"{model}:0")
        builds = "<lambda>"
        monkeypatch.setattr(TrainerWorld, "seconds", lambda _, fn: 5.0 * (fn.__name__ == builds))
        cluster.trainer.kill()
        await cluster.start_trainer()
        # On the address of the one before, for whose life these calls are meant.
        sample = json(prompt={"chunks": [{"type": "encoded_text", "tokens": [1]}]})
        promise = await cluster.ask(messages.SubmitSample(TENANT, sampler, 0, sample))
        assert (await cluster.outcome(await batch(cluster, model, 1))).state == "done"
        assert (await cluster.outcome(promise.request_id)).state == "done"
        cluster.check_journal()


async def test_lost_calls_and_answers_change_no_result(autojump_clock: MockClock, tmp_path: Path) -> None:
    expected = await _undisturbed(tmp_path, 10)
    async with Cluster.running(tmp_path / "lossy", loss=0.2) as cluster:
        model = await cluster.create(await cluster.session())
        assert await answers(cluster, await train(cluster, model, 1, 10)) == expected


async def test_a_job_that_kills_the_trainer_is_given_up_and_the_lane_goes_on(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        model = await cluster.create(await cluster.session())
        await cluster.outcome(f"{model}:0")
        cluster.trainer.deadly = b"deadly"
        await cluster.submit(model, 1, "forward_backward", b"deadly")
        await cluster.submit(model, 2, "forward_backward", b"harmless")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cluster.keep_trainer_alive)
            failed = await cluster.outcome(f"{model}:1")
            assert (failed.state, failed.category) == ("failed", "server")
            assert "died 3 times" in str(failed.error)
            assert (await cluster.outcome(f"{model}:2")).state == "done"
            nursery.cancel_scope.cancel()
        cluster.check_journal()


async def test_a_sample_in_flight_at_a_crash_is_run_again_as_the_same_request(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        session = await cluster.session()
        sampler = (await cluster.ask(messages.CreateSampler(TENANT, session, 0, base_model="sim/model"))).id
        body = json(prompt={"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]})
        promise = await cluster.ask(messages.SubmitSample(TENANT, sampler, 0, body, num_samples=2))
        assert promise.sample_sequence_ids == [f"{sampler}:0:0", f"{sampler}:0:1"]
        cluster.crash_worker()
        await cluster.start_worker()
        outcome = await cluster.outcome(promise.request_id)
        again = await cluster.ask(messages.SubmitSample(TENANT, sampler, 0, body, num_samples=2))
        assert again == promise
        assert outcome.body == (await cluster.outcome(promise.request_id)).body
        cluster.check_journal()


async def test_an_unsent_sample_can_be_withdrawn_and_ends_once(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        session = await cluster.session()
        sampler = (await cluster.ask(messages.CreateSampler(TENANT, session, 0, base_model="sim/model"))).id
        body = json(prompt={"chunks": [{"type": "encoded_text", "tokens": [1]}]})
        cluster.trainer.kill()
        jobs = [
            (await cluster.ask(messages.SubmitSample(TENANT, sampler, seq, body))).request_id
            for seq in range(8)
        ]
        for job in jobs:
            await cluster.ask(messages.CancelJob(TENANT, job))
        await cluster.start_trainer()
        states = {(await cluster.outcome(job)).state for job in jobs}
        assert states == {"done", "cancelled"}
        cluster.check_journal()


async def test_a_stopping_worker_tells_those_who_wait_to_ask_again(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        model = await cluster.create(await cluster.session())
        cluster.trainer.kill()
        await cluster.submit(model, 1, "forward_backward", b"batch")
        router = cluster.router
        assert router is not None
        with pytest.RaisesGroup(Overloaded):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(router.ask, messages.AwaitOutcome(TENANT, f"{model}:1"))
                await trio.testing.wait_all_tasks_blocked(0.5)
                router.release_waiters()


async def test_a_checkpoint_can_be_loaded_overwritten_published_and_expires(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        session = await cluster.session()
        model = await cluster.create(session)
        jobs = await train(cluster, model, 1, 1)
        save = json(model_id=model, seq_id=3, path="one", ttl_seconds=3600)
        await cluster.submit(model, 3, "save_weights", save)
        path = f"tinker://{model}/weights/one"
        assert (await cluster.outcome(f"{model}:3")).result == {"path": path}

        await cluster.submit(model, 4, "save_weights", json(model_id=model, seq_id=4, path="one"))
        taken = await cluster.outcome(f"{model}:4")
        assert (taken.category, "exists already" in str(taken.error)) == ("user", True)

        load = messages.SubmitTraining(
            TENANT,
            op="load_weights",
            session_id=session,
            model_id=ids.model_id(session, 1),
            seq_id=0,
            model_seq_id=1,
            body=json(path=path, optimizer=True),
        )
        await cluster.ask(load)
        assert (await cluster.outcome(f"{session}:train:1:0")).result == {
            "path": path,
            "model_id": f"{session}:train:1",
        }
        # It goes on exactly where the other one was.
        mine = json(model_id="", seq_id=0, adam_params={"learning_rate": 1.0})
        await cluster.submit(model, 5, "optim_step", mine)
        await cluster.submit(f"{session}:train:1", 1, "optim_step", mine)
        assert (await cluster.outcome(f"{model}:5")).result == (
            await cluster.outcome(f"{session}:train:1:1")
        ).result

        await cluster.ask(messages.ChangeCheckpoint(TENANT, path, public=True))
        view: list[rows.Checkpoint] = await cluster.ask(messages.ListCheckpoints(TENANT, model))
        assert [checkpoint.public for checkpoint in view] == [True]
        await trio.sleep(3700)
        assert await cluster.ask(messages.ListCheckpoints(TENANT, model)) == []
        assert len(jobs) == 2
        cluster.check_journal()


async def test_a_lost_trainer_is_brought_up_from_the_newest_snapshot_and_not_from_the_start(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path / "undisturbed") as cluster:
        model = await cluster.create(await cluster.session())
        expected = await long_run(cluster, model, 20)
    async with Cluster.running(tmp_path / "crashed", snapshot_seconds=0.05) as cluster:
        model = await cluster.create(await cluster.session())
        results = await long_run(cluster, model, 15)
        taken = events(cluster, "snapshot_taken")
        assert len(taken) > 3
        assert len(events(cluster, "snapshot_dropped")) == len(taken) - 2, "two are kept"
        cluster.trainer.kill()
        await cluster.start_trainer()
        sent = cluster.network.calls
        await cluster.outcome(await batch(cluster, model, 31))
        assert cluster.network.calls - sent < 20, "the redo is short"
        await step(cluster, model, 32)
        results += await answers(cluster, [f"{model}:31", f"{model}:32"])
        assert results == expected[: len(results)]
        assert events(cluster, "diverged") == []
        cluster.check_journal()


async def test_a_model_is_restored_when_it_is_used_and_not_before(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path, snapshot_seconds=0.05) as cluster:
        session = await cluster.session()
        models = [await cluster.create(session, number) for number in range(3)]
        for model in models:
            await long_run(cluster, model, 4)
        cluster.trainer.kill()
        await cluster.start_trainer()
        await trio.sleep(60.0)
        assert cluster.watch.at == {}
        await cluster.outcome(await batch(cluster, models[1], 9))
        assert cluster.watch.at == {models[1]: 10}
        await cluster.outcome(await batch(cluster, models[0], 9))
        assert cluster.watch.at == {models[1]: 10, models[0]: 10}
        cluster.check_journal()


@pytest.mark.parametrize("op", ["forward_backward", "optim_step"])
async def test_a_redo_that_gives_something_else_is_told_and_the_run_goes_on(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        model = await cluster.create(await cluster.session())
        await answers(cluster, await train(cluster, model, 1, 2))
        really = getattr(HashEngine, op)

        def differently(self: HashEngine, *args: Any) -> Any:
            result = really(self, *args)
            if isinstance(result, dict):
                return result | {"weights": 0.5}
            return msgspec.structs.replace(result, body=b"rounded")

        monkeypatch.setattr(HashEngine, op, differently)
        cluster.trainer.kill()
        await cluster.start_trainer()
        assert (await cluster.outcome(await batch(cluster, model, 5))).state == "done"
        told = [event["op_no"] for event in events(cluster, "diverged")]
        assert told == ([2, 4] if op == "forward_backward" else [3, 5])
        assert b"tink_diverged_total 2.0" in await cluster.ask(messages.GetMetrics(""))
        cluster.crash_worker()
        await cluster.start_worker()
        assert b"tink_diverged_total 2.0" in await cluster.ask(messages.GetMetrics(""))
        cluster.check_journal()


async def test_an_operation_that_takes_long_delays_no_other_model(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch, 600.0, lambda arguments: "long" in arguments and "ForwardBackward" in arguments)
    async with Cluster.running(tmp_path) as cluster:
        session = await cluster.session()
        models = [await cluster.create(session, number) for number in range(2)]
        await cluster.submit(models[0], 1, "forward_backward", b"long")
        with trio.fail_after(60.0):
            await long_run(cluster, models[1], 10)
        assert (await cluster.outcome(f"{models[0]}:1")).state == "done"
        assert cluster.nature.counts["long polls"] > 10
        cluster.check_journal()


async def test_a_damaged_snapshot_is_found_and_the_one_before_it_is_used(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path, snapshot_seconds=0.05) as cluster:
        model = await cluster.create(await cluster.session())
        await long_run(cluster, model, 15)
        newest = events(cluster, "snapshot_taken")[-1]
        (cluster.trainer.artifacts / newest["directory"] / "state").write_bytes(b"damaged")
        cluster.trainer.kill()
        await cluster.start_trainer()
        assert (await cluster.outcome(await batch(cluster, model, 31))).state == "done"
        dropped = events(cluster, "snapshot_dropped")
        assert {"snapshot_id": newest["snapshot_id"], "reason": "damaged"} in dropped
        assert events(cluster, "diverged") == []
        cluster.check_journal()


async def test_a_snapshot_that_cannot_be_written_delays_nothing_and_is_tried_again(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    # Longer than the two operations may take that come behind the first snapshot.
    async with Cluster.running(tmp_path, snapshot_seconds=0.1) as cluster:
        model = await cluster.create(await cluster.session())
        cluster.trainer.disk_full = True
        await long_run(cluster, model, 6)
        assert events(cluster, "snapshot_taken") == []
        cluster.trainer.disk_full = False
        await batch(cluster, model, 13)
        await cluster.outcome(await step(cluster, model, 14))
        await cluster.outcome(await batch(cluster, model, 15))
        assert len(events(cluster, "snapshot_taken")) == 1
