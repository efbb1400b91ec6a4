"""vLLM servers that are neither well nor gone, and what they are given that they cannot bear: whatever it
is, whose fault it is is told, and nobody else's samples are disturbed."""

from __future__ import annotations

import dataclasses
import random
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import httpx
import msgspec
import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from tests.simulation.cluster import TENANT, Cluster
from tests.simulation.scenario import json
from tests.simulation.users import User, placements, restarting, servers, up, with_room_for
from tests.vllm.double import VllmDouble
from tink.actors.megatron import MegatronActor
from tink.domain import ids, messages
from tink.domain.events import Entry
from tink.limits import ADAPTER_SECONDS, REPLICA_STALL_SECONDS

Meddle = Callable[[VllmDouble, str, bytes], Awaitable[httpx.Response | None]]


def meddle(monkeypatch: pytest.MonkeyPatch, what: Meddle) -> None:
    """Answers some requests of all servers in their place."""
    handle = VllmDouble.handle

    async def meddled(self: VllmDouble, request: httpx.Request) -> httpx.Response:
        # One that is down refuses connections, whatever is asked.
        answer = await what(self, request.url.path, await request.aread()) if self.up else None
        return await handle(self, request) if answer is None else answer

    monkeypatch.setattr(VllmDouble, "handle", meddled)


def error(status: int, message: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message}})


LOAD, UNLOAD, COMPLETE = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/completions"


async def state(cluster: Cluster, number: int = 0) -> str:
    health: messages.Health = await cluster.ask(messages.GetHealth(""))
    return health.servers[f"http://vllm-{number}:8000"]


async def failed_save(user: User) -> str:
    """Saves weights, which fails: why."""
    user.seq += 1
    body = json(model_id=user.model, seq_id=user.seq, sampling_session_seq_id=100 + user.seq)
    job = await user.cluster.submit(user.model, user.seq, "save_weights_for_sampler", body)
    outcome = await user.cluster.outcome(job.request_id)
    assert (outcome.state, outcome.category) == ("failed", "server")
    return str(outcome.error)


# -- slow, busy, paused, half alive -----------------------------------------------------------------


async def test_a_server_that_is_too_busy_costs_a_sample_none_of_its_attempts(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = False

    async def refuse(server: VllmDouble, path: str, body: bytes) -> httpx.Response | None:
        return error(429, "too many requests") if busy and b'"max_tokens":4' in body else None

    meddle(monkeypatch, refuse)
    async with Cluster.running(tmp_path, vllm=servers(1)) as cluster:
        user = await User.begin(cluster)
        sampler = await user.save()
        busy = True
        job = await user.ask(sampler)
        await trio.sleep(60.0)
        busy = False
        assert (await cluster.outcome(job)).body == user.right(sampler)
        cluster.check_journal()


@pytest.mark.parametrize("seconds", [3.0, 90.0])
async def test_a_slow_server_is_waited_for(
    autojump_clock: MockClock, tmp_path: Path, seconds: float
) -> None:
    """Each token takes so long: a long prompt on a CPU, or others that are before it."""
    (server,) = vllm = servers(1)
    async with Cluster.running(tmp_path, vllm=vllm) as cluster:
        user = await User.begin(cluster)
        sampler = await user.save()
        server.token_seconds = seconds
        job = await user.ask(sampler, tokens=2)
        await trio.sleep(seconds)
        server.token_seconds = 0.001  # for others: what runs has begun at its own pace
        outcome = await cluster.outcome(job)
        assert outcome.body == user.right(sampler, tokens=2), outcome.error
        assert server.lives == 1
        cluster.check_journal()


async def test_an_adapter_that_is_unloaded_by_hand_disturbs_no_other_sample(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    (server,) = vllm = servers(1, token_seconds=0.5)
    async with Cluster.running(tmp_path, vllm=vllm) as cluster:
        users = [await User.begin(cluster, number) for number in range(2)]
        sampler = await users[0].save()
        job = await users[0].ask(sampler, tokens=60)
        for _ in range(2):
            await trio.sleep(9.0)
            for name in [name for name in server.adapters if users[1].model in name]:
                del server.adapters[name]
        assert (await cluster.outcome(job)).body == users[0].right(sampler, tokens=60)
        with closing(sqlite3.connect(cluster.home.journal)) as journal:
            query = "SELECT attempts FROM jobs WHERE job_id = ?"
            assert journal.execute(query, (job,)).fetchone() == (1,)
        other = await users[1].save()
        assert await users[1].sample(other) == users[1].right(other)


async def test_a_server_that_is_paused_when_it_is_met_is_said_to_be(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    (server,) = vllm = servers(1)
    server.pause()
    async with Cluster.running(tmp_path, vllm=vllm) as cluster:
        await trio.sleep(2 * REPLICA_STALL_SECONDS)
        health: messages.Health = await cluster.ask(messages.GetHealth(""))
        assert "is it paused?" in health.servers["http://vllm-0:8000"]
        server.resume()
        await up(cluster, 1)


async def test_a_save_that_failed_leaves_no_name_for_the_next_one(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """One server has the version, the other refused it: the next save is of other files."""
    first, second = vllm = servers(2)
    async with Cluster.running(tmp_path, vllm=vllm, retention_hours=0.0) as cluster:
        await up(cluster, 2)
        user = await User.begin(cluster)
        second.refuses_loads = "no room"
        body = json(model_id=user.model, seq_id=1, sampling_session_seq_id=0)
        job = await cluster.submit(user.model, 1, "save_weights_for_sampler", body)
        assert (await cluster.outcome(job.request_id)).state == "failed"
        second.refuses_loads, body_kind = "", "save_weights_for_sampler"
        user.seq = 1
        sampler = await user.save()
        for seed in range(4):
            await trio.sleep(1000.0)  # what the first save has left is removed
            assert await user.sample(sampler, seed) == user.right(sampler, seed)
        assert not (cluster.trainer.artifacts / ids.directory(user.model, 2, body_kind)).exists()
        assert (first.lives, second.lives) == (1, 1)
        cluster.check_journal()


async def test_a_server_whose_loads_hang_is_left_and_the_others_serve(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room_for(monkeypatch, 2)
    stuck = False
    first, second = vllm = servers(2)

    async def hang(server: VllmDouble, path: str, body: bytes) -> httpx.Response | None:
        if stuck and server is first and path in (LOAD, UNLOAD, COMPLETE):
            await trio.sleep_forever()
        return None

    meddle(monkeypatch, hang)
    async with Cluster.running(tmp_path, vllm=vllm) as cluster:
        await up(cluster, 2)
        user = await User.begin(cluster)
        for _ in range(6):
            await user.train()
            await user.save()
        stuck = True
        began = trio.current_time()
        jobs = [await user.ask(user.samplers[seed % 6], seed) for seed in range(60)]
        for seed, job in enumerate(jobs):
            outcome = await cluster.outcome(job)
            assert outcome.body == user.right(user.samplers[seed % 6], seed), outcome.error
        assert trio.current_time() - began < 4 * REPLICA_STALL_SECONDS
        assert second.up
        cluster.check_journal()


async def test_a_look_that_is_slow_takes_no_eviction_for_a_loss(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room_for(monkeypatch, 2)

    async def slow(server: VllmDouble, path: str, body: bytes) -> httpx.Response | None:
        if path != "/v1/models":
            return None
        await trio.sleep(0.5)
        answer = server._models()
        await trio.sleep(0.5)
        return answer

    meddle(monkeypatch, slow)
    async with Cluster.running(tmp_path, vllm=servers(1, token_seconds=0.01)) as cluster:
        user = await User.begin(cluster)
        for _ in range(5):
            await user.train()
            await user.save()
        with capture_logs() as lines:
            for seed in range(100):
                sampler = user.samplers[seed % 5]
                assert await user.sample(sampler, seed) == user.right(sampler, seed)
        assert not [line for line in lines if line["event"] in ("vllm server lost", "sample moved")]


async def test_a_server_that_is_paused_again_and_again_costs_a_sample_none_of_its_attempts(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    (server,) = vllm = servers(1, token_seconds=0.5)
    async with Cluster.running(tmp_path, vllm=vllm) as cluster:
        user = await User.begin(cluster)
        sampler = await user.save()
        job = await user.ask(sampler, tokens=60)
        for _ in range(5):
            await trio.sleep(10.0)
            server.pause()
            await trio.sleep(5.0)
            server.resume()
        assert (await cluster.outcome(job)).body == user.right(sampler, tokens=60)
        cluster.check_journal()


async def test_outages_are_each_waited_for_however_many_there_are(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    (server,) = vllm = servers(1, token_seconds=0.5)
    async with Cluster.running(tmp_path, vllm=vllm, vllm_wait_seconds=60.0, max_attempts=9) as cluster:
        user = await User.begin(cluster)
        sampler = await user.save()
        job = await user.ask(sampler, tokens=60)
        for _ in range(4):
            await trio.sleep(10.0)
            server.kill()
            await trio.sleep(40.0)
            server.start()
        assert (await cluster.outcome(job)).body == user.right(sampler, tokens=60)
        cluster.check_journal()


async def test_a_server_that_hangs_over_what_it_is_to_unload_is_met_nevertheless(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = False
    (server,) = vllm = servers(1)

    async def hang(server: VllmDouble, path: str, body: bytes) -> httpx.Response | None:
        if stuck and path == UNLOAD and b"tink/nobody" not in body:
            await trio.sleep_forever()
        return None

    meddle(monkeypatch, hang)
    async with Cluster.running(tmp_path, vllm=vllm) as cluster:
        user = await User.begin(cluster)
        sampler = await user.save()
        cluster.crash_worker()
        name, adapter = next(iter(server.adapters.items()))
        for number in range(5):
            server.adapters[f"{name}-{number}"] = adapter._replace(name=f"{name}-{number}")
        stuck = True
        await cluster.start_worker()
        began = trio.current_time()
        await up(cluster, 1)
        assert trio.current_time() - began < 2 * ADAPTER_SECONDS
        assert await user.sample(sampler) == user.right(sampler)


async def test_a_server_that_refuses_looks_for_a_moment_loses_nothing_and_is_not_pestered(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing, looks = False, 0

    async def refuse(server: VllmDouble, path: str, body: bytes) -> httpx.Response | None:
        nonlocal looks
        if not refusing or path != "/v1/models":
            return None
        looks += 1
        return error(503, "too much to do")

    meddle(monkeypatch, refuse)
    async with Cluster.running(tmp_path, vllm=servers(1, token_seconds=1.0)) as cluster:
        user = await User.begin(cluster)
        sampler = await user.save()
        job = await user.ask(sampler, tokens=60)
        await trio.sleep(10.0)
        refusing = True
        await trio.sleep(20.0)
        refusing = False
        assert 5 <= looks <= 15
        assert (await cluster.outcome(job)).body == user.right(sampler, tokens=60)
        cluster.check_journal()


async def test_a_long_queue_is_no_failure(autojump_clock: MockClock, tmp_path: Path) -> None:
    """Hours of work for one server, and every sample is served."""
    (server,) = vllm = servers(1, token_seconds=0.4, max_num_seqs=1)
    async with Cluster.running(tmp_path, vllm=vllm) as cluster:
        user = await User.begin(cluster)
        sampler = await user.save()
        jobs = [await user.ask(sampler, seed, tokens=200) for seed in range(40)]
        for seed, job in enumerate(jobs):
            outcome = await cluster.outcome(job)
            assert outcome.body == user.right(sampler, seed, tokens=200), outcome.error
        assert server.lives == 1
        cluster.check_journal()


async def test_a_server_that_is_silent_for_a_moment_loses_nothing(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    (server,) = vllm = servers(1, token_seconds=1.0)
    async with Cluster.running(tmp_path, vllm=vllm) as cluster:
        user = await User.begin(cluster)
        sampler = await user.save()
        job = await user.ask(sampler, tokens=100)
        for _ in range(3):
            await trio.sleep(20.0)
            server.hang()
            await trio.sleep(8.0)
            server.recover()
        assert (await cluster.outcome(job)).body == user.right(sampler, tokens=100)
        assert len(server.answered) < 6, "it was asked once"
        cluster.check_journal()


async def test_an_outage_while_a_version_is_loaded_is_not_the_versions_fault(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing answers for a while, on three servers that were loading it."""
    slow = False

    async def slowly(server: VllmDouble, path: str, body: bytes) -> httpx.Response | None:
        if slow and path == LOAD:
            await trio.sleep_forever()
        return None

    meddle(monkeypatch, slowly)
    vllm = servers(3)
    async with Cluster.running(tmp_path, vllm=vllm) as cluster:
        await up(cluster, 3)
        user = await User.begin(cluster)
        slow = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(user.save)
            await trio.sleep(1.0)
            for server in vllm:
                server.hang()
            await trio.sleep(60.0)
            slow = False
            for server in vllm:
                server.recover()
        assert await user.sample(user.samplers[0]) == user.right(user.samplers[0])
        cluster.check_journal()


async def test_a_server_that_is_too_busy_to_load_is_asked_again(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = False

    async def refuse(server: VllmDouble, path: str, body: bytes) -> httpx.Response | None:
        return error(503, "busy") if path == LOAD and busy else None

    meddle(monkeypatch, refuse)
    async with Cluster.running(tmp_path, vllm=servers(1)) as cluster:
        user = await User.begin(cluster)
        busy = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(user.save)
            await trio.sleep(60.0)
            busy = False
        assert await user.sample(user.samplers[0]) == user.right(user.samplers[0])
        busy = True
        assert "no vLLM server has taken the adapter" in await failed_save(user)
        cluster.check_journal()


async def test_a_version_that_is_made_while_a_server_comes_back_is_there_soon(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the journal tells where it is, whichever server was late."""
    slow: list[VllmDouble] = []

    async def slowly(server: VllmDouble, path: str, body: bytes) -> httpx.Response | None:
        if server in slow and path == LOAD:
            await trio.sleep(20.0)
        return None

    meddle(monkeypatch, slowly)
    first, second = vllm = servers(2)
    async with Cluster.running(tmp_path, vllm=vllm) as cluster, trio.open_nursery() as nursery:
        await up(cluster, 2)
        user = await User.begin(cluster)
        slow.append(second)
        # One is restarted after it was given the version, while the other one is still loading it.
        nursery.start_soon(user.save)
        await trio.sleep(5.0)
        first.kill()
        first.start()
        await trio.sleep(60.0)
        # One is met while a version is made.
        second.kill()
        second.start()
        await trio.sleep(5.0)
        await user.save()
        await trio.sleep(100.0)
        for server in vllm:
            assert sorted(name.rpartition("@")[2][0] for name in server.adapters)[-1] == "2"
            assert all(placements(cluster)[v, f"vllm-{n}"] == "loaded" for n in (0, 1) for v in "2")
        assert placements(cluster)["1", "vllm-0"] == "loaded"
        assert any("@1" in name for name in first.adapters)
        cluster.check_journal()


# -- what servers cannot bear -----------------------------------------------------------------------


async def test_an_adapter_that_kills_servers_when_it_is_loaded_keeps_no_other_from_being_served(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadly: list[str] = []

    async def die(server: VllmDouble, path: str, body: bytes) -> httpx.Response | None:
        if path == LOAD and any(name.encode() in body for name in deadly):
            server.kill()
            raise httpx.ReadError("connection reset")
        return None

    meddle(monkeypatch, die)
    vllm = servers(2)
    async with Cluster.running(tmp_path, vllm=vllm) as cluster, restarting(vllm):
        await up(cluster, 2)
        bad, good = [await User.begin(cluster, number) for number in range(2)]
        poison, sampler = await bad.save(), await good.save()
        deadly.append(bad.model)
        for server in vllm:
            server.kill()
        await trio.sleep(60.0)
        lives = sum(server.lives for server in vllm)
        began = trio.current_time()
        assert await good.sample(sampler) == good.right(sampler)
        assert trio.current_time() - began < 1.0
        # Whoever wants it is told, and no more servers die of it.
        failed = await cluster.outcome(await bad.ask(poison))
        assert (failed.state, failed.category) == ("failed", "server")
        assert "failed 3 times while they loaded the adapter" in str(failed.error)
        await cluster.outcome(await bad.ask(poison, 1))
        assert sum(server.lives for server in vllm) - lives <= 4
        # Nor of a new one.
        await up(cluster, 2)
        assert "failed 3 times while they loaded the adapter" in await failed_save(bad)
        await trio.sleep(60.0)
        assert sum(server.lives for server in vllm) - lives <= 10, "two at a time, at most"
        assert await good.sample(sampler, 1) == good.right(sampler, 1)
        cluster.check_journal()


async def test_those_who_were_out_when_a_server_died_are_soon_served_all_of_them(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Not one after the other."""
    vllm = servers(2, token_seconds=0.1)
    async with Cluster.running(tmp_path, vllm=vllm) as cluster:
        await up(cluster, 2)
        user = await User.begin(cluster)
        sampler = await user.save()
        jobs = [await user.ask(sampler, seed, tokens=20) for seed in range(200)]
        await trio.sleep(0.5)
        vllm[0].kill()
        began = trio.current_time()
        for seed, job in enumerate(jobs):
            assert (await cluster.outcome(job)).body == user.right(sampler, seed, tokens=20)
        # About a hundred of two seconds each.
        assert trio.current_time() - began < 40.0
        cluster.check_journal()


async def test_a_load_whose_answer_is_lost_is_a_load(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losing = False

    async def lose(server: VllmDouble, path: str, body: bytes) -> httpx.Response | None:
        nonlocal losing
        if losing and path == LOAD:
            losing = False
            server._load(msgspec.json.decode(body))
            raise httpx.ReadError("connection reset")
        return None

    meddle(monkeypatch, lose)
    vllm = servers(1)
    async with Cluster.running(tmp_path, vllm=vllm) as cluster:
        user = await User.begin(cluster)
        for _ in range(3):
            await user.train()
            losing = True
            sampler = await user.save()
            assert await user.sample(sampler) == user.right(sampler)
        assert len(vllm[0].adapters) == 4
        assert vllm[0].lives == 1
        cluster.check_journal()


async def test_a_server_that_unloads_nothing_keeps_the_files_and_is_asked_again(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = False

    async def refuse(server: VllmDouble, path: str, body: bytes) -> httpx.Response | None:
        return error(400, "not now") if refusing and path == UNLOAD else None

    meddle(monkeypatch, refuse)
    (server,) = vllm = servers(1, max_cpu_loras=1)
    async with Cluster.running(tmp_path, vllm=vllm, retention_hours=0.0) as cluster:
        user = await User.begin(cluster)
        for _ in range(2):
            await user.train()
            await user.save()
        other = await User.begin(cluster, 1)
        for name in ("a", "b"):
            await other.save_named(name)
        refusing = True
        with capture_logs() as lines:
            await cluster.ask(messages.FinishSession(TENANT, user.session, "success"))
            # The end of a checkpoint makes retention look.
            await cluster.ask(
                messages.DeleteCheckpoint(TENANT, f"tinker://{other.model}/sampler_weights/a")
            )
            await trio.sleep(200.0)
        assert len(server.adapters) == 6
        left = cluster.trainer.artifacts.rglob("*-save_weights_for_sampler")
        assert {str(path) for path in left} < {adapter.path for adapter in server.adapters.values()}
        assert not [line for line in lines if line["event"] == "actor crashed"]
        assert sum(line["event"] == "adapter not unloaded" for line in lines) == 5, "told once of each"
        refusing = False
        await cluster.ask(messages.DeleteCheckpoint(TENANT, f"tinker://{other.model}/sampler_weights/b"))
        await trio.sleep(200.0)
        assert not server.adapters
        assert not list(cluster.trainer.artifacts.rglob("*-save_weights_for_sampler"))
        cluster.check_journal()


async def test_an_adapter_whose_files_are_damaged_is_not_served(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """vLLM would load it, and give other samples."""
    (server,) = vllm = servers(1)
    async with Cluster.running(tmp_path, vllm=vllm) as cluster:
        user = await User.begin(cluster)
        damaged = await user.save()
        directory = Path(next(a.path for a in server.adapters.values() if "@1" in a.name))
        await user.train()
        whole = await user.save()
        config = directory / "adapter_config.json"
        config.write_bytes(config.read_bytes() + b" ")
        server.kill()
        server.start()
        await up(cluster, 1)
        failed = await cluster.outcome(await user.ask(damaged))
        assert (failed.state, failed.category) == ("failed", "server")
        assert f"{config} is damaged" in str(failed.error)
        assert await user.sample(whole) == user.right(whole)
        cluster.check_journal()


async def test_what_a_server_does_not_give_up_keeps_its_files_also_where_nobody_knows_it(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(server: VllmDouble, path: str, body: bytes) -> httpx.Response | None:
        return error(400, "not now") if path == UNLOAD and b"tink/nobody" not in body else None

    meddle(monkeypatch, refuse)
    _, second = vllm = servers(2)
    async with Cluster.running(tmp_path, vllm=vllm, retention_hours=0.0) as cluster:
        await up(cluster, 2)
        user = await User.begin(cluster)
        await user.save_named("a")
        second.refuses_loads = "no room"
        await failed_save(user)
        cluster.crash_worker()
        await cluster.start_worker()
        await up(cluster, 2)
        await cluster.ask(messages.DeleteCheckpoint(TENANT, f"tinker://{user.model}/sampler_weights/a"))
        await trio.sleep(200.0)
        kept = {str(path) for path in cluster.trainer.artifacts.rglob("*-save_weights_for_sampler")}
        loaded = {a.path for server in vllm for a in server.adapters.values() if "adapter" not in a.path}
        assert len(loaded) == 2
        assert loaded <= kept
        cluster.check_journal()


# -- servers that are not what they should be -------------------------------------------------------


async def test_a_server_that_takes_no_adapters_says_so_at_once_and_serves_the_base_model(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path, vllm=servers(1, runtime_lora=False)) as cluster:
        await up(cluster, 1)
        assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in await state(cluster)
        session = await cluster.session()
        model = await cluster.create(session)
        failed = await cluster.outcome(f"{model}:0")
        assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in str(failed.error)
        sampler = await cluster.ask(messages.CreateSampler(TENANT, session, 0, base_model="sim/model"))
        assert await User(cluster, session, "").sample(sampler.id)
        cluster.check_journal()


async def test_one_server_without_adapters_leaves_them_to_the_others(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    first, second = vllm = servers(2)
    async with Cluster.running(tmp_path, vllm=vllm) as cluster:
        await up(cluster, 2)
        user = await User.begin(cluster)
        sampler = await user.save()
        first.runtime_lora = False
        first.kill()
        first.start()
        await trio.sleep(20.0)
        await up(cluster, 2)
        for seed in range(10):
            assert await user.sample(sampler, seed) == user.right(sampler, seed)
        assert await user.save()
        # While that one is away it is waited for.
        second.kill()
        job = await user.ask(sampler, 11)
        await trio.sleep(30.0)
        second.start()
        assert (await cluster.outcome(job)).body == user.right(sampler, 11)
        cluster.check_journal()


async def test_servers_that_are_not_alike_do_not_serve_together(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd: list[VllmDouble] = []

    async def shorter(server: VllmDouble, path: str, body: bytes) -> httpx.Response | None:
        if path != "/v1/models" or server not in odd:
            return None
        found = server._models().json()
        found["data"][0]["max_model_len"] = 64
        return httpx.Response(200, json=found)

    meddle(monkeypatch, shorter)
    first, second = servers(2)
    odd.append(second)
    async with Cluster.running(tmp_path, vllm=[first, second]) as cluster:
        await trio.sleep(10.0)
        states = sorted([await state(cluster, 0), await state(cluster, 1)])
        assert states[1] == "ready"
        assert "--max-model-len" in states[0]
        assert "start all of VLLM_BASE_URL with the same model and options" in states[0]


async def test_a_server_of_another_model_than_is_trained_serves_nothing(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, other = tmp_path / "trained", tmp_path / "other"
    for directory, size in ((trained, 64), (other, 128)):
        directory.mkdir()
        (directory / "config.json").write_bytes(json(model_type="qwen3", hidden_size=size))

    async def rooted(server: VllmDouble, path: str, body: bytes) -> httpx.Response | None:
        if path != "/v1/models":
            return None
        found = server._models().json()
        found["data"][0]["root"] = str(root)
        return httpx.Response(200, json=found)

    meddle(monkeypatch, rooted)
    root = other
    async with Cluster.running(tmp_path / "home", vllm=servers(1)) as cluster:
        await up(cluster, 1)
        cluster.trainer.base_path = str(trained)
        cluster.trainer.kill()
        await cluster.start_trainer()
        await trio.sleep(10.0)
        assert "hidden_size is 128" in await state(cluster)
        assert str(other) in await state(cluster)
        root = trained
        await up(cluster, 1)


async def test_several_servers_behind_one_url_are_told_apart(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    doubles = servers(2)

    chance = random.Random(1)

    class Balancer:
        def transport(self) -> httpx.AsyncBaseTransport:
            async def answer(request: httpx.Request) -> httpx.Response:
                return await chance.choice(doubles).handle(request)

            return httpx.MockTransport(answer)

    doubles[0]._generated = 1000
    with capture_logs() as lines:
        async with Cluster.running(tmp_path, vllm=[Balancer()]) as cluster:
            await trio.sleep(30.0)
            assert await state(cluster)
    reasons = [line["reason"] for line in lines if line["event"] == "vllm server lost"]
    assert any("list each of them in VLLM_BASE_URL" in reason for reason in reasons)


# -- the worker's own changes -----------------------------------------------------------------------


async def test_servers_that_are_not_used_any_more_have_nothing_in_the_journal(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    vllm = servers(2)
    async with Cluster.running(tmp_path, vllm=vllm) as cluster:
        await up(cluster, 2)
        await User.begin(cluster)
        everything = cluster.settings
        cluster.crash_worker()
        cluster.settings = dataclasses.replace(everything, vllm_base_url="http://vllm-0:8000")
        await cluster.start_worker()
        await up(cluster, 1)
        assert placements(cluster) == {("0", "vllm-0"): "loaded", ("0", "vllm-1"): "gone"}
        cluster.crash_worker()
        cluster.settings = dataclasses.replace(everything, use_vllm=False)
        await cluster.start_worker()
        assert set(placements(cluster).values()) == {"loaded", "gone"}
        assert placements(cluster)["0", "trainer"] == "loaded"
        cluster.check_journal()


async def test_vllm_may_be_turned_on_while_a_model_is_being_made(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm = servers(1)
    async with Cluster.running(tmp_path, vllm=vllm) as cluster:
        with_vllm = cluster.settings
        cluster.crash_worker()
        cluster.settings = dataclasses.replace(with_vllm, use_vllm=False)
        await cluster.start_worker()
        session = await cluster.session()
        made = trio.Event()

        async def stop(self: MegatronActor, job: object, adapter: object) -> list[Entry]:
            made.set()
            await trio.sleep_forever()
            raise AssertionError

        with monkeypatch.context() as patch:
            patch.setattr(MegatronActor, "_placements", stop)
            model = await cluster.create(session)
            await made.wait()
        cluster.crash_worker()
        cluster.settings = with_vllm
        await cluster.start_worker()
        assert (await cluster.outcome(f"{model}:0")).state == "done"
        user = User(cluster, session, model)
        await user.train()
        sampler = await user.save()
        assert await user.sample(sampler) == user.right(sampler)
        cluster.check_journal()
