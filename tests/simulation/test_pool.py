"""vLLM servers: adapters are there before they are asked for, each sampler gets its version, and whatever
happens to a server its samples are answered. (The servers are doubles made of recorded exchanges; the
contract tests hold them against a real one.)"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from tests.simulation.cluster import TENANT, Cluster
from tests.simulation.scenario import events, json
from tests.simulation.users import PROMPT, User, placements, restarting, servers, up, with_room_for
from tests.vllm.double import VllmDouble
from tink.domain import messages
from tink.errors import BackendError, NotFound, UserError
from tink.limits import REPLICA_STALL_SECONDS
from tink.wire import tink_train


async def test_a_new_model_is_there_once_every_server_can_sample_it(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    vllm = servers(2)
    async with Cluster.running(tmp_path, vllm=vllm) as cluster:
        await up(cluster, 2)
        user = await User.begin(cluster)
        for server in vllm:
            (name,) = server.adapters
            assert f"{user.model}@0" in name
            assert name.startswith(f"tink/{cluster.journal.home_id[:12]}/")  # type: ignore[union-attr]
        assert placements(cluster) == {("0", "vllm-0"): "loaded", ("0", "vllm-1"): "loaded"}
        assert [event["version"] for event in events(cluster, "adapter_exported")] == [0]
        cluster.check_journal()


async def test_a_sampler_keeps_its_version_whatever_is_saved_later_and_through_restarts(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    vllm = servers(2)
    async with Cluster.running(tmp_path, vllm=vllm) as cluster:
        user = await User.begin(cluster)
        async with trio.open_nursery() as nursery:
            for version in range(5):
                await user.train()
                sampler = await user.save()
                for seed in range(4):
                    nursery.start_soon(_same, user, user.samplers[seed % (version + 1)], seed)
                assert await user.sample(sampler, 9) == user.right(sampler, 9)
        for server in vllm:
            server.kill()
            server.start()
        await up(cluster, 2)
        for sampler in user.samplers:
            assert await user.sample(sampler) == user.right(sampler)
        assert len({user.right(sampler) for sampler in user.samplers}) == 5
        cluster.check_journal()


async def _same(user: User, sampler: str, seed: int) -> None:
    assert await user.sample(sampler, seed, tokens=30) == user.right(sampler, seed, tokens=30)


async def test_a_server_that_comes_back_empty_has_its_adapters_before_requests(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    (server,) = vllm = servers(1)
    async with Cluster.running(tmp_path, vllm=vllm) as cluster:
        user = await User.begin(cluster)
        await user.train()
        sampler = await user.save()
        server.kill()
        job = await user.ask(sampler)
        await trio.sleep(20.0)
        server.start()
        outcome = await cluster.outcome(job)
        assert outcome.body == user.right(sampler)
        (answered,) = [answer for answer in server.answered[-1:] if answer.model in server.adapters]
        assert "@1" in answered.model
        # The journal tells of all of it.
        with closing(sqlite3.connect(cluster.home.journal)) as journal:
            query = "SELECT data FROM events WHERE kind = 'adapter_placed' AND adapter_id LIKE '%@1'"
            states = [msgspec.json.decode(data)["state"] for (data,) in journal.execute(query)]
        assert states == ["loaded", "gone", "loaded"]
        cluster.check_journal()


@pytest.mark.parametrize("what", ["kill", "pause", "drain", "hang", "freeze"])
async def test_samples_in_flight_move_to_another_server_and_are_the_same(
    autojump_clock: MockClock, tmp_path: Path, what: str
) -> None:
    first, second = vllm = servers(2, token_seconds=0.05)
    async with Cluster.running(tmp_path, vllm=vllm) as cluster:
        await up(cluster, 2)
        user = await User.begin(cluster)
        await user.train()
        sampler = await user.save()
        jobs = [await user.ask(sampler, seed, tokens=40, n=2) for seed in range(0, 40, 2)]
        await trio.sleep(1.0)
        getattr(first, what)()
        began = trio.current_time()
        with trio.fail_after(20 * REPLICA_STALL_SECONDS):
            for seed, job in zip(range(0, 40, 2), jobs, strict=True):
                outcome = await cluster.outcome(job)
                assert outcome.state == "done", outcome.error
                assert outcome.body == user.right(sampler, seed, tokens=40, n=2)
        assert trio.current_time() - began < 3 * REPLICA_STALL_SECONDS
        # Nothing is sent to the one that fails; and it is taken again when it is well.
        await up(cluster, 1)
        first.recover()
        first.resume()
        if not first.up or first.draining:
            first.kill()
            first.start()
        await up(cluster, 2)
        assert await user.sample(sampler) == user.right(sampler)
        assert second.up
        cluster.check_journal()


async def test_without_any_server_jobs_wait_and_then_say_what_to_do(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    vllm = servers(2)
    async with Cluster.running(tmp_path, vllm=vllm, vllm_wait_seconds=100.0) as cluster:
        user = await User.begin(cluster)
        await user.train()
        sampler = await user.save()
        for server in vllm:
            server.kill()
        await up(cluster, 0)
        began = trio.current_time()
        job = await user.ask(sampler)
        await trio.sleep(60.0)
        vllm[1].start()
        assert (await cluster.outcome(job)).state == "done"
        assert trio.current_time() - began < 75.0
        vllm[1].kill()
        await up(cluster, 0)
        began = trio.current_time()
        failed = await cluster.outcome(await user.ask(sampler))
        assert 99.0 < trio.current_time() - began < 110.0
        assert (failed.state, failed.category) == ("failed", "server")
        for part in ("vLLM server can't be reached", "http://vllm-0:8000", "VLLM_BASE_URL"):
            assert part in str(failed.error)
        # A new version that nobody can sample is no new version.
        body = json(model_id=user.model, seq_id=user.seq + 1, sampling_session_seq_id=77)
        save = await cluster.submit(user.model, user.seq + 1, "save_weights_for_sampler", body)
        assert "can't be reached" in str((await cluster.outcome(save.request_id)).error)
        cluster.check_journal()


async def test_those_who_wait_for_a_server_keep_nobody_from_training(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    vllm = servers(1)
    async with Cluster.running(tmp_path, vllm=vllm, max_workers=2) as cluster:
        users = [await User.begin(cluster, number) for number in range(4)]
        vllm[0].kill()
        await up(cluster, 0)
        for user in users[:3]:
            body = json(model_id=user.model, seq_id=1, sampling_session_seq_id=0)
            await cluster.submit(user.model, 1, "save_weights_for_sampler", body)
        await trio.sleep(5.0)
        with trio.fail_after(10.0):
            await users[3].train()
        vllm[0].start()
        for user in users[:3]:
            assert (await cluster.outcome(f"{user.model}:1")).state == "done"
        cluster.check_journal()


async def test_an_adapter_that_a_server_refuses_fails_its_job_with_the_reason(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    vllm = servers(1, max_lora_rank=16)
    async with Cluster.running(tmp_path, vllm=vllm) as cluster:
        session = await cluster.session()
        model = await cluster.create(session, 0, rank=32)
        failed = await cluster.outcome(f"{model}:0")
        assert (failed.state, failed.category) == ("failed", "server")
        assert "LoRA rank 32 is greater than max_lora_rank 16" in str(failed.error)
        user = await User.begin(cluster, 1, rank=16)
        vllm[0].refuses_loads = "no room"
        body = json(model_id=user.model, seq_id=1, sampling_session_seq_id=0)
        save = await cluster.submit(user.model, 1, "save_weights_for_sampler", body)
        assert "no room" in str((await cluster.outcome(save.request_id)).error)
        vllm[0].refuses_loads = ""
        user.seq = 1
        sampler = await user.save()
        assert await user.sample(sampler) == user.right(sampler)
        cluster.check_journal()


async def test_an_adapter_that_somebody_has_unloaded_is_loaded_again_unseen(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    (server,) = vllm = servers(1)
    async with Cluster.running(tmp_path, vllm=vllm) as cluster:
        user = await User.begin(cluster)
        sampler = await user.save()
        await trio.sleep(10.0)
        server.adapters.clear()
        assert await user.sample(sampler) == user.right(sampler)
        cluster.check_journal()


async def test_more_versions_than_a_server_is_given_take_turns_and_none_in_use_goes(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room_for(monkeypatch, 3)
    vllm = servers(1, max_loras=2, max_cpu_loras=2, token_seconds=0.02)
    async with Cluster.running(tmp_path, vllm=vllm) as cluster:
        user = await User.begin(cluster)
        for _ in range(8):
            await user.train()
            await user.save()
        assert len(vllm[0].adapters) == 3
        async with trio.open_nursery() as nursery:
            for seed in range(32):
                nursery.start_soon(_same, user, user.samplers[(seed * 5) % 8], seed)
        for sampler in user.samplers:
            assert await user.sample(sampler) == user.right(sampler)
        assert vllm[0].lives == 1
        await trio.sleep(10.0)
        assert len(vllm[0].adapters) == 3
        cluster.check_journal()


async def test_two_workers_on_one_server_touch_only_their_own_adapters(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    vllm = servers(1)
    async with Cluster.running(tmp_path / "one", 1, vllm=vllm) as one:
        first = await User.begin(one)
        sampler = await first.save()
        async with Cluster.running(tmp_path / "two", 2, vllm=vllm) as two:
            second = await User.begin(two)
            other = await second.save()
            assert len(vllm[0].adapters) == 4
            assert await second.sample(other) == second.right(other)
            theirs = {name for name in vllm[0].adapters if second.model in name}
            assert len(theirs) == 2
            one.crash_worker()
            await one.start_worker()
            await up(one, 1)
            assert theirs < set(vllm[0].adapters)
            assert await first.sample(sampler) == first.right(sampler)


async def test_what_is_deleted_is_taken_out_before_its_files_go(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    vllm = servers(2, max_cpu_loras=1)
    async with Cluster.running(tmp_path, vllm=vllm, retention_hours=0.0) as cluster:
        user, other = [await User.begin(cluster, number) for number in range(2)]
        for _ in range(3):
            await user.train()
            await user.save()
        kept = await other.save()
        await cluster.ask(messages.FinishSession(TENANT, user.session, "success"))
        for seed in range(4):
            await trio.sleep(1800.0)
            assert await other.sample(kept, seed) == other.right(kept, seed)
        assert [len(server.adapters) for server in vllm] == [1, 1]
        assert {state for (version, _), state in placements(cluster).items() if version == "3"} == {"gone"}
        left = {path.name for path in (cluster.trainer.artifacts).rglob("*-save_weights_for_sampler")}
        assert len(left) == 1
        assert [server.lives for server in vllm] == [1, 1]
        assert await other.sample(kept) == other.right(kept)
        cluster.check_journal()


async def test_a_model_that_is_unloaded_is_nowhere_any_more_but_for_what_was_saved_by_name(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    vllm = servers(2)
    async with Cluster.running(tmp_path, vllm=vllm) as cluster:
        await up(cluster, 2)
        user, other = [await User.begin(cluster, number) for number in range(2)]
        await user.train()
        await user.save_named("best")
        await user.train()
        sampler = await user.save()
        open_sample = await user.ask(sampler)
        await cluster.submit(user.model, user.seq + 1, "forward_backward", b"the last batch")
        promise = await cluster.unload(user.model)
        assert await cluster.unload(user.model) == promise
        outcome = await cluster.outcome(promise.request_id)
        assert outcome.result == {"model_id": user.model, "type": "unload_model"}
        assert (await cluster.outcome(f"{user.model}:{user.seq + 1}")).state == "done", "it came before"
        assert (await cluster.outcome(open_sample)).body == user.right(sampler)
        await trio.sleep(130.0)
        # Not on the servers, not on the disk, not at the trainer, not for its client.
        for server in vllm:
            assert not [name for name in server.adapters if user.model in name]
            assert len(server.adapters) == 1
        assert {state for (version, _), state in placements(cluster).items() if version != "0"} == {"gone"}
        left = {path.name for path in cluster.trainer.artifacts.rglob("*-save_weights_for_sampler")}
        assert len(left) == 1
        with pytest.raises(NotFound):
            await cluster.router_ask(messages.GetModel(TENANT, user.model))
        with pytest.raises(UserError, match="was given to a job that came without one, a unload_model"):
            await cluster.submit(user.model, user.seq + 2, "forward_backward", b"too late")
        late = await cluster.submit(user.model, user.seq + 3, "forward_backward", b"too late")
        assert "was unloaded" in str((await cluster.outcome(late.request_id)).error)
        assert "their model was unloaded" in str((await cluster.outcome(await user.ask(sampler, 1))).error)
        listed = await cluster.router_ask(messages.ListCheckpoints(TENANT, user.model))
        assert [checkpoint.name for checkpoint in listed] == ["best"]
        # What has a name is loaded when somebody asks for it.
        path = f"tinker://{user.model}/sampler_weights/best"
        best = (await cluster.ask(messages.CreateSampler(TENANT, user.session, 99, model_path=path))).id
        assert await user.sample(best) == user.right(best)
        await trio.sleep(30.0)
        assert any(user.model in name for server in vllm for name in server.adapters), "it has a sampler"
        # The same promise, whenever it is asked again; also by another life of the worker.
        cluster.crash_worker()
        await cluster.start_worker()
        assert await cluster.unload(user.model) == promise
        assert await other.sample(await other.save())
        cluster.check_journal()


async def test_a_model_that_the_trainer_has_lost_is_unloaded_without_a_redo(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        user = await User.begin(cluster)
        for _ in range(5):
            await user.train()
        cluster.trainer.kill()
        await cluster.start_trainer()
        promise = await cluster.unload(user.model)
        assert (await cluster.outcome(promise.request_id)).state == "done"
        assert not cluster.nature.counts["operations redone"]
        other = await User.begin(cluster, 1)
        await other.train()
        cluster.check_journal()


async def test_what_is_sampled_when_its_model_is_unloaded_goes_soon_after_the_sample(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    vllm = servers(2, token_seconds=1.0)
    async with Cluster.running(tmp_path, vllm=vllm) as cluster:
        user = await User.begin(cluster)
        sampler = await user.save()
        long = await user.ask(sampler, tokens=200)
        promise = await cluster.unload(user.model)
        assert (await cluster.outcome(promise.request_id)).state == "done"
        await trio.sleep(100.0)
        assert any(user.model in name for server in vllm for name in server.adapters), "it is sampled"
        assert (await cluster.outcome(long)).body == user.right(sampler, tokens=200)
        await trio.sleep(150.0)
        assert not any(server.adapters for server in vllm)
        assert not list(cluster.trainer.artifacts.rglob("*-save_weights_for_sampler"))


async def test_a_model_that_cannot_be_redone_is_unloaded_and_leaves_the_trainer(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        user = await User.begin(cluster)
        for _ in range(3):
            await user.train()
        with closing(sqlite3.connect(cluster.home.journal)) as journal:
            query = "SELECT body_sha256 FROM jobs WHERE op = 'forward_backward' ORDER BY op_no"
            bodies = [digest for (digest,) in journal.execute(query)]
        assert cluster.journal is not None
        await cluster.journal.bodies.drop(bodies[1:2], ())
        cluster.trainer.kill()
        await cluster.start_trainer()
        lost = await cluster.submit(user.model, user.seq + 1, "forward_backward", b"any")
        assert "cannot be applied again" in str((await cluster.outcome(lost.request_id)).error)
        engine = cluster.trainer.engine
        assert engine is not None
        assert engine.state(user.model) is not None, "redone in part"
        promise = await cluster.unload(user.model)
        assert (await cluster.outcome(promise.request_id)).state == "done"
        assert engine.state(user.model) is None


@pytest.mark.parametrize("seed", range(6))
async def test_a_worker_that_dies_anywhere_goes_on_with_the_same_adapters(
    autojump_clock: MockClock, tmp_path: Path, seed: int
) -> None:
    vllm = servers(2)
    async with Cluster.running(tmp_path, seed, vllm=vllm) as cluster:
        user = await User.begin(cluster)

        async def die() -> None:
            while True:
                await trio.sleep(cluster.rng.random())
                cluster.crash_worker()
                await cluster.start_worker()
                if cluster.rng.random() < 0.3:
                    server = cluster.rng.choice(vllm)
                    server.kill()
                    server.start()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(die)
            for _ in range(4):
                await user.train()
                sampler = await user.save()
                assert await user.sample(sampler, tokens=30) == user.right(sampler, tokens=30)
            nursery.cancel_scope.cancel()
        await cluster.start_worker()
        await up(cluster, 2)
        for sampler in user.samplers:
            assert await user.sample(sampler) == user.right(sampler)
        versions = [event["version"] for event in events(cluster, "adapter_exported")]
        assert versions == [0, 1, 2, 3, 4]
        cluster.check_journal()


async def test_a_sample_that_kills_servers_is_given_up_and_takes_no_other_with_it(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadly = 666
    handle = VllmDouble.handle

    async def dying(self: VllmDouble, request: Any) -> Any:
        if self.up and b'"seed":666' in await request.aread():
            await trio.sleep(0.3)
            self.kill()
            raise httpx.ReadError("connection reset")
        return await handle(self, request)

    monkeypatch.setattr(VllmDouble, "handle", dying)
    vllm = servers(2, token_seconds=0.05)
    async with Cluster.running(tmp_path, vllm=vllm) as cluster, restarting(vllm):
        await up(cluster, 2)
        user = await User.begin(cluster)
        sampler = await user.save()
        jobs = [await user.ask(sampler, seed, tokens=20) for seed in range(10)]
        poison = await user.ask(sampler, deadly)
        jobs += [await user.ask(sampler, seed, tokens=20) for seed in range(10, 20)]
        failed = await cluster.outcome(poison)
        assert (failed.state, failed.category) == ("failed", "server")
        assert "failed 3 times while it ran this job" in str(failed.error)
        for seed, job in enumerate(jobs):
            assert (await cluster.outcome(job)).body == user.right(sampler, seed, tokens=20)
        cluster.check_journal()


async def test_work_goes_to_the_server_with_least_of_it_and_like_prompts_stay_together(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    vllm = servers(2, token_seconds=0.05)
    async with Cluster.running(tmp_path, vllm=vllm) as cluster:
        await up(cluster, 2)
        user = await User.begin(cluster)
        samplers = [await user.save() for _ in range(4)]
        for _ in range(5):
            for sampler in samplers:
                await user.sample(sampler)
        homes = [{answer.model for answer in server.answered if "@" in answer.model} for server in vllm]
        assert not homes[0] & homes[1], "a prompt goes where its beginning is known"
        jobs = [await user.ask(samplers[0], seed, tokens=50) for seed in range(100)]
        for job in jobs:
            await cluster.outcome(job)
        counts = [sum(answer.body["max_tokens"] == 50 for answer in server.answered) for server in vllm]
        assert min(counts) > 30, "but not at the price of a queue"


async def test_prompts_are_scored_by_the_trainer_and_keep_nobody_from_being_sampled(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    (server,) = vllm = servers(1)
    async with Cluster.running(tmp_path, vllm=vllm) as cluster:
        user = await User.begin(cluster)
        sampler = await user.save()
        cluster.trainer.kill()
        scores = [await user.ask(sampler, seed, prompt_logprobs=True) for seed in range(600)]
        assert await user.sample(sampler) == user.right(sampler)
        await cluster.start_trainer()
        for job in scores:
            assert (await cluster.outcome(job)).state == "done"
        assert not any(answer.body["prompt_logprobs"] for answer in server.answered)
        with closing(sqlite3.connect(cluster.home.journal)) as journal:
            query = "SELECT DISTINCT backend FROM jobs WHERE job_id IN (?, ?)"
            assert journal.execute(query, (scores[0], scores[-1])).fetchall() == [("trainer",)]
        cluster.check_journal()


async def test_processed_logprobs_are_told_of_at_the_start(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    with capture_logs() as lines:
        async with Cluster.running(tmp_path, vllm=servers(1, logprobs_mode="processed")) as cluster:
            await up(cluster, 1)
    assert [line["remedy"] for line in lines if line["event"] == "vllm server gives processed logprobs"]


class OldTrl:
    """A `trl vllm-serve` before 1.11, as far as it goes."""

    def transport(self) -> httpx.AsyncBaseTransport:
        return httpx.MockTransport(self._answer)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        match request.url.path:
            case "/get_world_size/":
                return httpx.Response(200, json={"world_size": 1})
            case "/health/":
                return httpx.Response(200, json={"status": "ok"})
            case "/generate/":
                asked = msgspec.json.decode(request.content)
                count, tokens = asked["n"], asked["generation_kwargs"]["max_tokens"]
                return httpx.Response(
                    200,
                    json={
                        "prompt_ids": asked["prompts"],
                        "completion_ids": [[7] * tokens] * count,
                        "logprobs": [[[-1.0]] * tokens] * count,
                        "logprob_token_ids": [[[7]] * tokens] * count,
                    },
                )
        return httpx.Response(404, json={"detail": "Not Found"})


async def test_an_old_trl_server_samples_the_base_model_and_says_that_it_can_do_no_more(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path, vllm=[OldTrl()]) as cluster:
        await up(cluster, 1)
        session = await cluster.session()
        sampler = await cluster.ask(messages.CreateSampler(TENANT, session, 0, base_model="sim/model"))
        assert await User(cluster, session, "").sample(sampler.id)
        model = await cluster.create(session)
        failed = await cluster.outcome(f"{model}:0")
        assert failed.state == "failed"
        assert "before 1.11 serves the base model alone" in str(failed.error)
        cluster.check_journal()


async def test_an_old_trl_alone_serves_its_base_model(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with Cluster.running(tmp_path, vllm=[OldTrl()], use_hf="false") as cluster:
        cluster.trainer.kill()
        await up(cluster, 1)
        session = await cluster.session()
        with trio.fail_after(60.0):
            capabilities: messages.Capabilities = await cluster.ask(messages.GetCapabilities(TENANT))
            base = capabilities.models[0].name
            sampler = await cluster.ask(messages.CreateSampler(TENANT, session, 0, base_model=base))
            assert await User(cluster, session, "").sample(sampler.id)


async def test_who_asks_what_servers_serve_that_never_came_is_told_that_they_did_not(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    (server,) = vllm = servers(1)
    server.kill()
    options = {"use_hf": "false", "vllm_wait_seconds": 5.0}
    async with Cluster.running(tmp_path, vllm=vllm, **options) as cluster:
        with pytest.raises(BackendError, match="vLLM server can't be reached"):
            await cluster.router_ask(messages.GetCapabilities(TENANT))
        server.start()
        assert (await cluster.ask(messages.GetCapabilities(TENANT))).models


async def test_an_old_trl_server_is_not_mixed_with_others(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path, vllm=[*servers(1), OldTrl()]) as cluster:
        await trio.sleep(10.0)
        health: messages.Health = await cluster.ask(messages.GetHealth(""))
        states = sorted(state for url, state in health.servers.items() if "vllm" in url)
        assert "one of them is a trl vllm-serve before 1.11" in states[0]
        assert states[1].startswith("ready")


async def test_samples_alone_need_no_trainer(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with Cluster.running(tmp_path, vllm=servers(1), use_hf="false") as cluster:
        cluster.trainer.kill()
        session = await cluster.session()
        capabilities: messages.Capabilities = await cluster.ask(messages.GetCapabilities(TENANT))
        (model,) = capabilities.models
        assert (model.sampleable, model.trainable) == (True, False)
        created = await cluster.ask(messages.CreateSampler(TENANT, session, 0, base_model=model.name))
        user = User(cluster, session, "")
        body = await user.sample(created.id)
        request = tink_train.SampleRequest("any", PROMPT, 0, max_tokens=4)
        assert body == VllmDouble().would_answer(request, None)
