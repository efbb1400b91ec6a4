"""Two things at once, at the worst moment: each of these once stopped the worker, or hurt a bystander."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.simulation.cluster import TENANT, Cluster
from tests.simulation.scenario import events, json, slow
from tink.domain import ids, messages
from tink.domain.events import JobAccepted, JobDone, JobStarted, SessionCreated, Subject
from tink.errors import JournalUnavailable, NotFound, UserError
from tink.home import Home
from tink.journal.journal import Journal
from tink.world import World


async def test_a_repeat_while_its_ended_job_still_holds_the_lane_is_the_same_job(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch, 5.0, lambda arguments: "-snapshot" in arguments)
    async with Cluster.running(tmp_path, snapshot_seconds=0.0) as cluster:
        model = await cluster.create(await cluster.session())
        step = json(model_id=model, seq_id=1)
        first = await cluster.submit(model, 1, "optim_step", step)
        await cluster.outcome(first.request_id)
        # Its snapshot is being written.
        assert await cluster.submit(model, 1, "optim_step", step) == first
        await cluster.submit(model, 2, "optim_step", json(model_id=model, seq_id=2))
        assert (await cluster.outcome(f"{model}:2")).state == "done"
        cluster.check_journal()


@pytest.mark.parametrize("rival", ["sampler", "save"])
async def test_a_sampler_number_that_two_want_is_had_by_one(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rival: str
) -> None:
    slow(monkeypatch, 2.0, lambda arguments: "ExportAdapter" in arguments)
    async with Cluster.running(tmp_path) as cluster:
        session = await cluster.session()
        models = [await cluster.create(session, number) for number in range(2)]
        for model in models:
            await cluster.outcome(f"{model}:0")
        save = json(model_id="", seq_id=1, sampling_session_seq_id=5)
        await cluster.submit(models[0], 1, "save_weights_for_sampler", save)
        await trio.sleep(1.0)
        if rival == "sampler":
            await cluster.ask(messages.CreateSampler(TENANT, session, 5, base_model="sim/model"))
            states = [(await cluster.outcome(f"{models[0]}:1")).category]
        else:
            await cluster.submit(models[1], 1, "save_weights_for_sampler", save)
            states = [(await cluster.outcome(f"{model}:1")).category for model in models]
            states.remove(None)
        assert states == ["user"]
        cluster.check_journal()


@pytest.mark.parametrize("first", ["delete", "save"])
async def test_a_checkpoint_that_is_overwritten_and_deleted_at_once_goes_once(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    slow(monkeypatch, 5.0, lambda arguments: "CheckpointDeleted" in arguments)
    async with Cluster.running(tmp_path) as cluster:
        model = await cluster.create(await cluster.session())
        path = f"tinker://{model}/weights/a"
        for seq in (1, 2):
            await cluster.outcome(f"{model}:{seq - 1}")
            again = json(model_id=model, seq_id=seq, path="a", overwrite=True)
            await cluster.submit(model, seq, "save_weights", again)
            if seq == 2 and first == "save":
                await trio.sleep(2.0)
        await cluster.ask(messages.DeleteCheckpoint(TENANT, path))
        assert (await cluster.outcome(f"{model}:2")).state == "done"
        gone = [event["checkpoint_id"] for event in events(cluster, "checkpoint_deleted")]
        assert len(gone) == len(set(gone)) == (1 if first == "delete" else 2)
        cluster.check_journal()


async def test_what_is_submitted_to_a_model_in_the_making_comes_after_it_in_the_journal(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        session = await cluster.session()
        model = ids.model_id(session, 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cluster.create, session)
            await trio.lowlevel.checkpoint()
            nursery.start_soon(cluster.submit, model, 1, "optim_step", json(model_id=model, seq_id=1))
        assert (await cluster.outcome(f"{model}:1")).state == "done"
        cluster.check_journal()


async def test_a_restarted_actor_gets_every_open_job_once(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        model = await cluster.create(await cluster.session())
        await cluster.outcome(f"{model}:0")
        router = cluster.router
        assert router is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cluster.submit, model, 1, "forward_backward", b"batch")
            for _ in range(50):
                nursery.start_soon(cluster.ask, messages.ListSessions(TENANT))
            nursery.start_soon(router.restarted, router._training)
        assert (await cluster.outcome(f"{model}:1")).state == "done"
        cluster.check_journal()


async def test_a_bug_that_one_job_meets_is_that_jobs_failure_only(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tink.domain import plans

    training = plans.training

    def buggy(job: Any, body: bytes, *rest: Any) -> Any:
        if body == b"bug":
            raise KeyError("bug")
        return training(job, body, *rest)

    monkeypatch.setattr(plans, "training", buggy)
    async with Cluster.running(tmp_path) as cluster:
        session = await cluster.session()
        models = [await cluster.create(session, number) for number in range(2)]
        await cluster.submit(models[0], 1, "forward_backward", b"bug")
        for seq in (1, 2):
            await cluster.submit(models[1], seq, "forward_backward", b"batch")
        await cluster.submit(models[0], 2, "forward_backward", b"batch")
        failed = await cluster.outcome(f"{models[0]}:1")
        assert (failed.category, "internal error" in str(failed.error)) == ("server", True)
        for job in (f"{models[0]}:2", f"{models[1]}:1", f"{models[1]}:2"):
            assert (await cluster.outcome(job)).state == "done"
        cluster.check_journal()


async def test_a_job_that_kills_the_trainer_takes_no_neighbour_with_it(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch, 1.0, lambda arguments: "neighbour" in arguments)
    async with Cluster.running(tmp_path) as cluster:
        session = await cluster.session()
        models = [await cluster.create(session, number) for number in range(3)]
        for model in models:
            await cluster.outcome(f"{model}:0")
        cluster.trainer.deadly = b"deadly"
        for model in models[1:]:
            await cluster.submit(model, 1, "forward_backward", b"neighbour")
        await cluster.submit(models[0], 1, "forward_backward", b"deadly")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cluster.keep_trainer_alive)
            assert "died 3 times" in str((await cluster.outcome(f"{models[0]}:1")).error)
            for model in models[1:]:
                assert (await cluster.outcome(f"{model}:1")).state == "done"
            nursery.cancel_scope.cancel()
        cluster.check_journal()


async def test_what_does_not_need_the_trainer_does_not_wait_for_it(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        session = await cluster.session()
        model = await cluster.create(session)
        await cluster.outcome(f"{model}:0")
        cluster.trainer.kill()
        cluster.crash_worker()
        await cluster.start_worker()
        with trio.fail_after(5.0):
            for question in (
                messages.GetHealth(""),
                messages.GetCapabilities(TENANT),
                messages.GetModel(TENANT, model),
                messages.ListModels(TENANT),
                messages.CreateSampler(TENANT, session, 0, base_model="sim/model"),
            ):
                assert await cluster.router_ask(question) is not None


async def test_a_worker_that_serves_nothing_says_so_at_once(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path, use_hf="false") as cluster:
        session = await cluster.session()
        with trio.fail_after(5.0):
            assert (await cluster.router_ask(messages.GetCapabilities(TENANT))).models == []
            assert await cluster.router_ask(messages.ListModels(TENANT)) == []
            with pytest.raises(UserError, match=r"^No valid sampling backend configured$"):
                await cluster.router_ask(messages.CreateSampler(TENANT, session, 0, base_model="sim/model"))
            with pytest.raises(UserError, match=r"^Training not supported in non-Megatron mode$"):
                await cluster.router_ask(
                    messages.SubmitTraining(
                        TENANT,
                        op="create_model",
                        session_id=session,
                        model_id=f"{session}:train:0",
                        seq_id=0,
                        model_seq_id=0,
                        body=b"{}",
                    )
                )


async def test_a_checkpoint_whose_files_are_gone_is_not_found(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        model = await cluster.create(await cluster.session())
        await cluster.submit(model, 1, "save_weights", json(model_id=model, seq_id=1, path="one"))
        await cluster.outcome(f"{model}:1")
        question = messages.GetCheckpoint(TENANT, f"tinker://{model}/weights/one")
        assert (await cluster.ask(question)).files
        shutil.rmtree(cluster.trainer.artifacts)
        with pytest.raises(NotFound, match="not in the artifact folder"):
            await cluster.router_ask(question)


async def _append(home: Home, *batches: tuple[tuple[Subject, Any], ...]) -> None:
    async with Journal.open(home, World(), version="x", settings_digest="x") as journal:
        for batch in batches:
            await journal.append(*batch)


@pytest.mark.parametrize(
    ("seq", "event"),
    [
        (0, JobDone(metrics={"grad_norm": float("nan")})),  # JSON has no NaN: it would read back otherwise
        (7, JobStarted(attempt=1, backend="trainer")),  # of a job that is not there
    ],
)
async def test_an_event_that_would_stop_every_later_start_is_never_committed(
    tmp_path: Path, seq: int, event: Any
) -> None:
    home = Home(tmp_path / "home")
    home.make()
    model = f"{'s' * 32}:train:0"
    made = Subject(tenant="t", session_id="s" * 32, model_id=model, job_id=f"{model}:0")
    session = (Subject(tenant="t", session_id="s" * 32), SessionCreated())
    job = (made, JobAccepted(op="create_model", seq_id=0, model_seq_id=0, request="{}"))
    bad = (Subject(tenant="t", model_id=model, job_id=f"{model}:{seq}"), event)
    with pytest.raises((JournalUnavailable, ExceptionGroup)):
        await _append(home, (session, job), (bad,))
    async with Journal.open(home, World(), version="x", settings_digest="x") as journal:
        found = await journal.job(f"{model}:0")
        assert found is not None
        assert found.state == "accepted"
