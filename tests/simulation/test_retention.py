"""What nothing needs leaves the disk, what anything needs stays, and a crash in between changes neither."""

from __future__ import annotations

import logging
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio
from trio.testing import MockClock

from tests.simulation import chaos
from tests.simulation.cluster import TENANT, Cluster, stored_bodies
from tests.simulation.doubles import SimulatedWorld
from tests.simulation.program import program
from tests.simulation.scenario import answers, batch, events, json, long_run, slow, step, train
from tink.actors.artifacts import ArtifactFolder
from tink.actors.megatron import MegatronActor
from tink.domain import ids, messages, rows
from tink.domain.events import JobAccepted
from tink.errors import NotFound
from tink.limits import EXPIRY_SECONDS, LEAST_KEPT_SECONDS

HOUR = 3600.0
PROMPT = json(prompt={"chunks": [{"type": "encoded_text", "tokens": [1]}]})


class Clock:
    """The wall clock, which can be set. Durations are not touched by that."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._ahead = 0.0
        patch.setattr(SimulatedWorld, "now", lambda _: 1_700_000_000.0 + trio.current_time() + self._ahead)

    def jump(self, seconds: float) -> None:
        self._ahead += seconds

    async def later(self, cluster: Cluster, seconds: float) -> None:
        """As if so much time had passed, and the worker been restarted: its first pass is over."""
        self.jump(seconds)
        await restart(cluster)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


async def restart(cluster: Cluster) -> None:
    cluster.crash_worker()
    await cluster.start_worker()
    await a_pass()


async def a_pass() -> None:
    """Longer than the pass at the start takes."""
    await trio.sleep(5)


async def a_minute() -> None:
    """From one look for ended checkpoints to behind the next one."""
    await trio.sleep(EXPIRY_SECONDS + 5)


def bodies(cluster: Cluster) -> set[str]:
    return set(stored_bodies(cluster.home))


def jobs(cluster: Cluster, column: str, where: str = "TRUE") -> set[str]:
    with closing(sqlite3.connect(cluster.home.journal)) as connection:
        return {value for (value,) in connection.execute(f"SELECT {column} FROM jobs WHERE {where}")}


def uncovered(cluster: Cluster) -> set[str]:
    """The bodies of the only model's operations behind the older one of its two snapshots."""
    with closing(sqlite3.connect(cluster.home.journal)) as connection:
        found = connection.execute("SELECT op_no FROM snapshots WHERE state = 'live' ORDER BY op_no DESC")
        _newest, (older,), *_ = found.fetchall()
    return jobs(cluster, "body_sha256", f"op_no > {older} AND body_sha256 IS NOT NULL")


def directories(cluster: Cluster) -> set[str]:
    """What lies in the artifact folder, by its last name."""
    return {path.parent.name for path in cluster.trainer.artifacts.glob("*/*/*/manifest.json")}


def scratch(cluster: Cluster) -> set[str]:
    return {path.name for path in (cluster.trainer.artifacts / ids.SCRATCH).iterdir()}


async def save(cluster: Cluster, model: str, seq: int, op: Any, **fields: object) -> str:
    """Saves, and returns what the client is told."""
    await cluster.submit(model, seq, op, json(model_id=model, seq_id=seq, **fields))
    outcome = await cluster.outcome(f"{model}:{seq}")
    assert outcome.result is not None, outcome.error
    return str(outcome.result.get("path") or outcome.result.get("sampling_session_id"))


async def sampler_of(cluster: Cluster, session: str, number: int, path: str) -> str:
    created: messages.Created = await cluster.ask(
        messages.CreateSampler(TENANT, session, number, model_path=path)
    )
    return created.id


async def sample(cluster: Cluster, sampler: str, seq: int) -> messages.Outcome:
    await cluster.ask(messages.SubmitSample(TENANT, sampler, seq, PROMPT))
    return await cluster.outcome(ids.job_id(sampler, seq))


async def load(cluster: Cluster, session: str, number: int, path: str) -> str:
    """A new model, made of what was saved."""
    model = ids.model_id(session, number)
    made = messages.SubmitTraining(
        TENANT,
        op="load_weights",
        session_id=session,
        model_id=model,
        seq_id=0,
        model_seq_id=number,
        body=json(path=path, optimizer=True),
    )
    await cluster.ask(made)
    assert (await cluster.outcome(f"{model}:0")).state == "done"
    return model


# -- bodies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damaged", [0, 1])
async def test_a_redo_after_pruning_gives_the_same_bits(
    autojump_clock: MockClock, clock: Clock, tmp_path: Path, damaged: int
) -> None:
    async with Cluster.running(tmp_path / "undisturbed") as cluster:
        model = await cluster.create(await cluster.session())
        expected = await long_run(cluster, model, 15)
    async with Cluster.running(tmp_path / "pruned", snapshot_seconds=0.05, retention_hours=0.0) as cluster:
        model = await cluster.create(await cluster.session())
        found = await long_run(cluster, model, 12)
        await clock.later(cluster, HOUR + 1)

        assert bodies(cluster) == uncovered(cluster)
        pruned = sum(one["count"] for one in events(cluster, "bodies_pruned"))
        assert pruned == 24 - len(bodies(cluster)) > 12
        if damaged:
            newest = events(cluster, "snapshot_taken")[-1]["directory"]
            (cluster.trainer.artifacts / newest / "state").write_bytes(b"damaged")
        cluster.trainer.kill()
        await cluster.start_trainer()
        found += await answers(cluster, await train(cluster, model, 25, 3))
        assert found == expected
        assert events(cluster, "diverged") == []
        cluster.check_journal()


async def test_without_both_snapshots_and_the_bodies_jobs_fail_until_the_files_are_back(
    autojump_clock: MockClock, clock: Clock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path, snapshot_seconds=0.05, retention_hours=0.0) as cluster:
        session = await cluster.session()
        model, other = [await cluster.create(session, number) for number in range(2)]
        await long_run(cluster, model, 12)
        await answers(cluster, await train(cluster, other, 1, 1))
        await clock.later(cluster, HOUR + 1)
        spoiled = {}
        for taken in events(cluster, "snapshot_taken")[-2:]:
            state = cluster.trainer.artifacts / taken["directory"] / "state"
            spoiled[taken["directory"]] = state.read_bytes()
            state.write_bytes(b"damaged")
        cluster.trainer.kill()
        await cluster.start_trainer()
        for seq in (25, 26):
            await (batch if seq % 2 else step)(cluster, model, seq)
            failed = await cluster.outcome(f"{model}:{seq}")
            assert (failed.state, failed.category) == ("failed", "server")
            assert "has lost the model" in str(failed.error)
            assert "not stored any more" in str(failed.error)
            assert "checkpoint" in str(failed.error)
        for taken in spoiled:
            (cluster.trainer.artifacts / taken / "state").write_bytes(spoiled[taken])
        await batch(cluster, model, 27)
        assert (await cluster.outcome(f"{model}:27")).state == "done", "nothing was given up"
        assert all(
            isinstance(answer, bytes | dict)
            for answer in await answers(cluster, await train(cluster, other, 3, 1))
        )
        cluster.check_journal()


async def test_what_is_younger_than_the_retention_time_stays_and_a_result_is_given_again(
    autojump_clock: MockClock, clock: Clock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path, snapshot_seconds=0.05, retention_hours=2.0) as cluster:
        model = await cluster.create(await cluster.session())
        await long_run(cluster, model, 8)
        first = await cluster.outcome(f"{model}:1")
        await clock.later(cluster, HOUR)
        assert events(cluster, "bodies_pruned") == []
        assert await cluster.outcome(f"{model}:1") == first
        await clock.later(cluster, HOUR)
        assert events(cluster, "bodies_pruned") != []
        with pytest.raises(NotFound, match="not stored any more"):
            await cluster.router_ask(messages.AwaitOutcome(TENANT, f"{model}:1"))
        # What it was is known for ever.
        assert len(jobs(cluster, "result_sha256", "op = 'forward_backward'")) == 8
        assert jobs(cluster, "min(body_bytes)", "op = 'forward_backward'") == {len(b"batch 1")}


async def test_a_result_outlives_a_retention_time_of_nothing_by_an_hour(
    autojump_clock: MockClock, clock: Clock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path, snapshot_seconds=0.05, retention_hours=0.0) as cluster:
        model = await cluster.create(await cluster.session())
        await long_run(cluster, model, 8)
        first = await cluster.outcome(f"{model}:1")
        await clock.later(cluster, LEAST_KEPT_SECONDS - 200)
        assert jobs(cluster, "body_sha256", "op_no = 2") & bodies(cluster) == set()
        assert await cluster.outcome(f"{model}:1") == first


async def test_a_body_whose_job_is_not_yet_journaled_stays_whatever_the_clock_does(
    autojump_clock: MockClock, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    month = 30 * 24 * HOUR
    monkeypatch.setattr("tink.journal.bodies.SHORT_BODY", -1)  # it is stored before its event
    slow(monkeypatch, 100.0, lambda arguments: f"{JobAccepted.__name__}(op='forward_backward'" in arguments)
    monkeypatch.setattr("tink.actors.retention.RETENTION_SECONDS", 1.0)
    # Also as if the worker itself could be fooled about the time.
    monkeypatch.setattr("tink.actors.retention.Retention._now", lambda self: self._world.now())
    async with Cluster.running(tmp_path, snapshot_seconds=0.05) as cluster:
        model = await cluster.create(await cluster.session())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(batch, cluster, model, 1)
            await trio.sleep(10)
            assert len(bodies(cluster)) == 1
            clock.jump(month)
            await trio.sleep(10)
            assert len(bodies(cluster)) == 1
            clock.jump(-2 * month)
        assert (await cluster.outcome(f"{model}:1")).state == "done"


async def test_a_clock_that_is_set_forward_makes_nothing_old_while_the_worker_runs(
    autojump_clock: MockClock, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tink.actors.retention.RETENTION_SECONDS", 1.0)
    async with Cluster.running(tmp_path, snapshot_seconds=0.05) as cluster:
        model = await cluster.create(await cluster.session())
        await long_run(cluster, model, 8)
        clock.jump(30 * 24 * HOUR)
        await trio.sleep(10)
        assert events(cluster, "bodies_pruned") == []


# -- adapters ---------------------------------------------------------------------------------------


async def test_weights_of_a_finished_session_go_and_a_sample_of_them_says_why(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        session = await cluster.session()
        model = await cluster.create(session)
        sampler = await save(cluster, model, 1, "save_weights_for_sampler", sampling_session_seq_id=0)
        named = await save(cluster, model, 2, "save_weights_for_sampler", path="named")
        assert (await sample(cluster, sampler, 0)).state == "done"
        await restart(cluster)
        assert directories(cluster) == {
            "00000002-save_weights_for_sampler",
            "00000003-save_weights_for_sampler",
        }
        await cluster.ask(messages.FinishSession(TENANT, session, "success"))
        await restart(cluster)
        assert directories(cluster) == {"00000003-save_weights_for_sampler"}
        assert events(cluster, "adapter_deleted") == [{"reason": "finished"}]
        failed = await sample(cluster, sampler, 1)
        assert (failed.state, failed.category) == ("failed", "user")
        assert "its session was finished" in str(failed.error)
        assert "save_weights_for_sampler" in str(failed.error)
        of_the_named = await sampler_of(cluster, await cluster.session(), 0, named)
        assert (await sample(cluster, of_the_named, 0)).state == "done"
        cluster.check_journal()


async def test_weights_that_had_no_request_for_the_retention_time_go_and_those_that_had_stay(
    autojump_clock: MockClock, clock: Clock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path, retention_hours=2.0) as cluster:
        model = await cluster.create(await cluster.session())
        idle, busy = [
            await save(cluster, model, 1 + n, "save_weights_for_sampler", sampling_session_seq_id=n)
            for n in range(2)
        ]
        await clock.later(cluster, 1.5 * HOUR)
        assert (await sample(cluster, busy, 0)).state == "done"
        await clock.later(cluster, 1.5 * HOUR)
        assert directories(cluster) == {"00000003-save_weights_for_sampler"}
        assert "no request for TINK_KEEP_ADAPTERS_HOURS" in str((await sample(cluster, idle, 0)).error)
        assert (await sample(cluster, busy, 1)).state == "done"
        await clock.later(cluster, 2 * HOUR)
        assert directories(cluster) == set()


async def test_weights_with_an_open_sample_stay(
    autojump_clock: MockClock, clock: Clock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path, retention_hours=2.0) as cluster:
        session = await cluster.session()
        model = await cluster.create(session)
        sampler = await save(cluster, model, 1, "save_weights_for_sampler", sampling_session_seq_id=0)
        cluster.trainer.kill()
        promise: messages.Promise = await cluster.ask(messages.SubmitSample(TENANT, sampler, 0, PROMPT))
        await cluster.ask(messages.FinishSession(TENANT, session, "success"))
        await clock.later(cluster, 100 * HOUR)
        assert events(cluster, "adapter_deleted") == []
        await cluster.start_trainer()
        assert (await cluster.outcome(promise.request_id)).state == "done"
        await restart(cluster)
        assert directories(cluster) == set()


async def test_weights_whose_checkpoint_was_deleted_stay_for_their_samplers_and_then_go(
    autojump_clock: MockClock, clock: Clock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path, retention_hours=2.0) as cluster:
        session = await cluster.session()
        model = await cluster.create(session)
        sampled, unsampled = [
            await save(cluster, model, seq, "save_weights_for_sampler", path=f"n{seq}") for seq in (1, 2)
        ]
        sampler = await sampler_of(cluster, session, 0, sampled)
        for path in (sampled, unsampled):
            await cluster.ask(messages.DeleteCheckpoint(TENANT, path))
        await a_minute()
        assert directories(cluster) == {"00000002-save_weights_for_sampler"}
        assert (await sample(cluster, sampler, 0)).state == "done"
        await clock.later(cluster, 2 * HOUR)
        assert directories(cluster) == set()
        assert events(cluster, "adapter_deleted") == [{"reason": "deleted"}] * 2
        assert "their checkpoint was deleted" in str((await sample(cluster, sampler, 1)).error)
        cluster.check_journal()


# -- checkpoints and snapshots ----------------------------------------------------------------------


async def test_an_overwritten_checkpoint_goes_within_a_minute(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        model = await cluster.create(await cluster.session())
        await a_pass()
        for seq in (1, 2, 3):
            await save(cluster, model, seq, "save_weights", path="last", overwrite=True)
        await a_minute()
        assert directories(cluster) == {"00000004-save_weights"}


@pytest.mark.parametrize("end", ["overwritten", "deleted", "expired"])
async def test_what_a_redo_would_load_stays_until_two_snapshots_cover_the_load(
    autojump_clock: MockClock, tmp_path: Path, end: str
) -> None:
    async with Cluster.running(tmp_path, snapshot_seconds=0.05) as cluster:
        session = await cluster.session()
        origin = await cluster.create(session)
        ttl = {"ttl_seconds": 60} if end == "expired" else {}
        path = await save(cluster, origin, 1, "save_weights", path="state", **ttl)
        model = await load(cluster, session, 1, path)
        state = "00000002-save_weights"
        if end == "overwritten":
            await save(cluster, origin, 2, "save_weights", path="state", overwrite=True)
        elif end == "deleted":
            await cluster.ask(messages.DeleteCheckpoint(TENANT, path))
        for _ in range(2):
            await a_minute()
        assert events(cluster, "checkpoint_deleted")[0]["reason"] == end
        await restart(cluster)
        assert state in directories(cluster)

        cluster.trainer.kill()
        await cluster.start_trainer()
        await long_run(cluster, model, 8)
        assert events(cluster, "diverged") == []
        assert len(events(cluster, "snapshot_taken")) > 2
        await restart(cluster)
        assert state not in directories(cluster)
        cluster.trainer.kill()
        await cluster.start_trainer()
        assert (await cluster.outcome(await batch(cluster, model, 17))).state == "done"
        assert events(cluster, "diverged") == []


async def test_a_redo_whose_state_to_load_is_gone_fails_the_models_jobs_and_no_other(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        session = await cluster.session()
        origin = await cluster.create(session)
        model = await load(
            cluster, session, 1, await save(cluster, origin, 1, "save_weights", path="state")
        )
        state = ids.directory(origin, 2, "save_weights")
        shutil.rmtree(cluster.trainer.artifacts / state)
        cluster.watch.damaged.add(state)
        cluster.trainer.kill()
        await cluster.start_trainer()
        for seq in (1, 2):
            failed = await cluster.outcome(await batch(cluster, model, seq))
            assert failed.category == "server"
            assert "has lost the model" in str(failed.error)
        assert (await cluster.outcome(await batch(cluster, origin, 2))).state == "done"


async def test_a_damaged_snapshot_is_left_for_the_retention_time(
    autojump_clock: MockClock, clock: Clock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path, snapshot_seconds=0.05, retention_hours=2.0) as cluster:
        model = await cluster.create(await cluster.session())
        await long_run(cluster, model, 8)
        newest = str(events(cluster, "snapshot_taken")[-1]["directory"])
        (cluster.trainer.artifacts / newest / "state").write_bytes(b"damaged")
        cluster.trainer.kill()
        await cluster.start_trainer()
        assert (await cluster.outcome(await batch(cluster, model, 17))).state == "done"
        await clock.later(cluster, HOUR)
        assert newest.rpartition("/")[2] in directories(cluster)
        await clock.later(cluster, HOUR)
        assert newest.rpartition("/")[2] not in directories(cluster)


async def test_only_what_this_journals_operations_left_is_cleared_away(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        root = cluster.trainer.artifacts
        session = await cluster.session()
        model = await cluster.create(session)
        await save(cluster, model, 1, "save_weights", path="kept")
        cluster.trainer.kill()
        await cluster.start_trainer()
        await answers(cluster, [await batch(cluster, model, 2)])
        dead, alive = [str(one["incarnation"]) for one in events(cluster, "trainer_started")]
        mine = ids.model_directory(model)
        ours = [
            f"{mine}/00000001-snapshot",
            f"{mine}/00000003-save_weights",
            f".tmp/{dead}-7",
            ".tmp/removed-0",
        ]
        others = [
            f"{mine}/notes",
            f"{mine}/00000004-snapshot",
            f"{session}/7/00000001-snapshot",
            f"{'0' * 32}/0/00000001-snapshot",
            "conformance/00000001-snapshot",
            f".tmp/{alive}-0",
            ".tmp/somebody-0",
        ]
        for name in ours + others:
            (root / name).mkdir(parents=True)
            (root / name / "file").write_bytes(b"content")
        await restart(cluster)
        assert [name for name in ours if (root / name).exists()] == []
        assert [name for name in others if not (root / name / "file").exists()] == []
        assert "00000002-save_weights" in directories(cluster)


# -- just at that moment ----------------------------------------------------------------------------


def pass_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RETENTION_SECONDS", "EXPIRY_SECONDS"):
        monkeypatch.setattr(f"tink.actors.retention.{name}", 0.02)


async def test_a_snapshot_that_is_published_and_not_yet_journaled_stays(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pass_all_the_time(monkeypatch)
    slow(monkeypatch, 5.0, lambda arguments: "SnapshotTaken" in arguments)
    async with Cluster.running(tmp_path, snapshot_seconds=0.0) as cluster:
        model = await cluster.create(await cluster.session())
        await answers(cluster, [await step(cluster, model, 1)])
        await trio.sleep(10)
        cluster.trainer.kill()
        await cluster.start_trainer()
        assert (await cluster.outcome(await batch(cluster, model, 2))).state == "done"
        assert len(events(cluster, "snapshot_taken")) >= 1
        assert {one["reason"] for one in events(cluster, "snapshot_dropped")} <= {"pruned"}


@pytest.mark.parametrize("hesitation", [0.0, 10.0])
async def test_a_state_that_is_deleted_just_when_it_is_to_be_loaded_is_loaded_and_stays_for_a_redo(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hesitation: float
) -> None:
    """`hesitation`: between the pass's decision and the removal."""
    begin, remove = MegatronActor._begin_attempt, ArtifactFolder.remove

    async def slowly_begin(self: MegatronActor, job: rows.Job, *rest: Any) -> None:
        await trio.sleep(5.0 if job.op == "load_weights" else 0.0)
        await begin(self, job, *rest)

    async def slowly_remove(self: ArtifactFolder, directory: str) -> bool:
        await trio.sleep(hesitation)
        return await remove(self, directory)

    pass_all_the_time(monkeypatch)
    monkeypatch.setattr(MegatronActor, "_begin_attempt", slowly_begin)
    monkeypatch.setattr(ArtifactFolder, "remove", slowly_remove)
    async with Cluster.running(tmp_path) as cluster:
        session = await cluster.session()
        origin = await cluster.create(session)
        path = await save(cluster, origin, 1, "save_weights", path="state")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load, cluster, session, 1, path)
            await trio.sleep(2.0)
            await cluster.ask(messages.DeleteCheckpoint(TENANT, path))
        await trio.sleep(20.0)
        cluster.trainer.kill()
        await cluster.start_trainer()
        model = ids.model_id(session, 1)
        assert (await cluster.outcome(await batch(cluster, model, 1))).state == "done"
        assert events(cluster, "diverged") == []


async def test_a_sample_that_comes_just_when_its_weights_are_deleted_is_drawn(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pass_all_the_time(monkeypatch)
    monkeypatch.setattr("tink.domain.retention.LEAST_KEPT_SECONDS", 0.0)
    slow(monkeypatch, 5.0, lambda arguments: "JobAccepted(op='sample'" in arguments)
    slow(monkeypatch, 2.0, lambda arguments: "AdapterDeleted" in arguments)
    slow(monkeypatch, 10.0, lambda arguments: "SampleRequest" in arguments)
    async with Cluster.running(tmp_path, retention_hours=20.0 / HOUR) as cluster:
        model = await cluster.create(await cluster.session())
        sampler = await save(cluster, model, 1, "save_weights_for_sampler", sampling_session_seq_id=0)
        await trio.sleep(18.0)
        assert (await sample(cluster, sampler, 0)).state == "done"
        assert events(cluster, "adapter_deleted") == [{"reason": "idle"}]
        await trio.sleep(5.0)
        assert directories(cluster) == set()
        assert (await sample(cluster, sampler, 1)).category == "user"


# -- crashes ----------------------------------------------------------------------------------------


class Death:
    """A worker dies before the nth piece of work that it does in a thread, once it has started."""

    def __init__(self, patch: pytest.MonkeyPatch, cluster: Cluster, nth: int) -> None:
        self.came = False
        run_sync, left = SimulatedWorld.run_sync, nth

        async def counted(world: SimulatedWorld, fn: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= world is cluster._world
            if left == 0 and not self.came:
                self.came = True
                cluster.crash_worker()
            return await run_sync(world, fn, *args, **kwargs)

        patch.setattr(SimulatedWorld, "run_sync", counted)


async def _much_to_clear_away(folder: Path) -> str:
    """A home with a model, and an ended thing of each kind."""
    async with Cluster.running(folder, snapshot_seconds=0.05) as cluster:
        session = await cluster.session()
        model = await cluster.create(session)
        await save(cluster, model, 1, "save_weights", path="state", ttl_seconds=60)
        await save(cluster, model, 2, "save_weights_for_sampler", sampling_session_seq_id=0)
        await answers(cluster, await train(cluster, model, 3, 6))
        await cluster.ask(messages.FinishSession(TENANT, session, "success"))
        (cluster.trainer.artifacts / ids.directory(model, 1, "snapshot")).mkdir()
    return model


async def test_a_crash_anywhere_in_a_pass_is_made_good_by_the_next_one(
    autojump_clock: MockClock, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A dying worker says much about it.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    model = await _much_to_clear_away(tmp_path / "before")
    clock.jump(2 * HOUR)
    settings = {"snapshot_seconds": 0.05, "retention_hours": 0.0}
    for nth in range(1, 100):
        shutil.copytree(tmp_path / "before", tmp_path / f"{nth}")
        async with Cluster.running(tmp_path / f"{nth}", nth, **settings) as cluster:
            with monkeypatch.context() as patch:
                death = Death(patch, cluster, nth)
                await a_pass()
            if not death.came:
                cluster.crash_worker()
            await cluster.start_worker()
            await a_pass()
            assert bodies(cluster) == uncovered(cluster)
            assert {name.partition("-")[2] for name in directories(cluster)} == {"snapshot"}
            assert not (cluster.trainer.artifacts / ids.directory(model, 1, "snapshot")).exists()
            assert scratch(cluster) == set()
            assert len(events(cluster, "adapter_deleted")) == 1
            assert len(events(cluster, "checkpoint_deleted")) == 1
            assert (await cluster.outcome(await batch(cluster, model, 15))).state == "done"
            assert events(cluster, "diverged") == []
            cluster.check_journal()
        if not death.came:
            assert nth > 15
            break
    else:
        raise AssertionError("it never ran to its end")


@pytest.mark.parametrize("seed", range(3))
def test_passes_without_end_change_nothing_that_a_client_gets(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chaos, with a pass every few milliseconds and nothing kept that is not needed."""
    pass_all_the_time(monkeypatch)

    what = program(seed)._replace(retention_hours=0.0, jump=300.0, slow=0.0)
    assert chaos.judge(seed, what).wrong is None
