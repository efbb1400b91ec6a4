"""Jobs that come without a number of their client's: in the order of their coming, each once by its key."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.simulation.cluster import TENANT, Cluster
from tests.simulation.scenario import answers, json, slow, train
from tink.actors.router import Router
from tink.domain import ids, messages
from tink.domain.requests import OpName
from tink.errors import NotFound, TooLarge, UserError
from tink.limits import MAX_COMMAND_BODY, MAX_SEQ


async def _batch(cluster: Cluster, model: str, value: int, key: str | None = None) -> str:
    body = f"batch {value}".encode()
    return (await cluster.submit(model, None, "forward_backward", body, key=key)).request_id


async def _step(cluster: Cluster, model: str, rate: float, key: str | None = None) -> str:
    body = json(model_id=model, adam_params={"learning_rate": rate})
    return (await cluster.submit(model, None, "optim_step", body, key=key)).request_id


def _jobs(cluster: Cluster) -> list[tuple[str, str | None]]:
    with closing(sqlite3.connect(cluster.home.journal)) as journal:
        return list(journal.execute("SELECT job_id, key FROM jobs ORDER BY accepted_seq"))


async def test_jobs_without_numbers_are_those_of_a_client_that_counts(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path / "counted") as cluster:
        model = await cluster.create(await cluster.session())
        expected = await answers(cluster, await train(cluster, model, 1, 2))
    async with Cluster.running(tmp_path / "not counted") as cluster:
        model = await cluster.create(await cluster.session())  # they may come before it is made
        jobs = []
        for value in (1, 3):
            jobs += [await _batch(cluster, model, value), await _step(cluster, model, value / 1000)]
        assert jobs == [ids.job_id(model, seq) for seq in (1, 2, 3, 4)]
        assert await answers(cluster, jobs) == expected
        keys = [key for job, key in _jobs(cluster) if job in jobs]
        assert len({*keys, None}) == 5, "each has a key of its own"
        cluster.check_journal()


async def test_a_repeat_under_its_key_is_the_first_job_in_every_life(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        model = await cluster.create(await cluster.session())
        first = [await _batch(cluster, model, 1, "a"), await _step(cluster, model, 0.5, "b")]

        async def again() -> list[str]:
            # In any order: what is there is not numbered again.
            step = await _step(cluster, model, 0.5, "b")
            return [await _batch(cluster, model, 1, "a"), step]

        assert await again() == first
        cluster.crash_worker()
        await cluster.start_worker()
        assert await again() == first, "open in the next life"
        results = await answers(cluster, first)
        assert await again() == first, "ended"
        cluster.crash_worker()
        await cluster.start_worker()
        assert await again() == first, "ended in another life"
        assert await answers(cluster, first) == results
        assert len(_jobs(cluster)) == 3
        assert await _batch(cluster, model, 1, "c") == ids.job_id(model, 3)
        cluster.check_journal()


async def test_two_submissions_at_once_under_one_key_make_one_job(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        model = await cluster.create(await cluster.session())
        slow(monkeypatch, 0.5, lambda arguments: "JobAccepted" in arguments)
        jobs: list[str] = []

        async def submit(value: int) -> None:
            await trio.sleep(value / 10)
            jobs.append(await _batch(cluster, model, 1, "a"))

        async with trio.open_nursery() as nursery:
            for value in range(9):
                nursery.start_soon(submit, value)
        assert len(jobs) == 9
        assert len(set(jobs)) == 1
        await cluster.outcome(jobs[0])
        cluster.check_journal()


@pytest.mark.parametrize("victim", ["worker", "power"])
@pytest.mark.parametrize("seed", range(6))
async def test_a_client_that_got_no_answer_asks_again_and_has_one_job(
    autojump_clock: MockClock, tmp_path: Path, victim: str, seed: int
) -> None:
    """The worker dies somewhere between a submission and its answer, or a little later."""
    async with Cluster.running(tmp_path, seed) as cluster:
        model = await cluster.create(await cluster.session())
        await cluster.outcome(f"{model}:0")

        async def die() -> None:
            for _ in range(cluster.rng.randrange(60)):
                await trio.lowlevel.checkpoint()
            (cluster.crash_worker if victim == "worker" else cluster.cut_power)()
            await cluster.start_trainer()
            await cluster.start_worker()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(die)
            jobs = [await _batch(cluster, model, 1, "a"), await _step(cluster, model, 0.5, "b")]
        assert jobs == [f"{model}:1", f"{model}:2"]
        await answers(cluster, jobs)
        assert [await _batch(cluster, model, 1, "a"), await _step(cluster, model, 0.5, "b")] == jobs
        cluster.check_journal()


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("ended", [False, True])
async def test_another_request_under_a_key_is_refused_and_does_nothing(
    autojump_clock: MockClock, tmp_path: Path, restarted: bool, ended: bool
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        session = await cluster.session()
        model, other = [await cluster.create(session, number) for number in range(2)]
        jobs = [await _batch(cluster, model, 1, "a"), await _step(cluster, model, 0.5, "b")]
        if ended:
            await answers(cluster, jobs)
        if restarted:
            cluster.crash_worker()
            await cluster.start_worker()
        others: list[tuple[OpName, bytes, str]] = [
            ("forward_backward", b"batch 2", "a"),
            ("forward", b"batch 1", "a"),
            ("optim_step", b"batch 1", "a"),
            ("optim_step", json(model_id=model), "b"),
        ]
        for op, body, key in others:
            with pytest.raises(UserError, match=r"key was used for another request, the .*: use a new"):
                await cluster.submit(model, None, op, body, key=key)
        # Keys are a model's own.
        assert await _batch(cluster, other, 2, "a") == f"{other}:1"
        assert await _batch(cluster, model, 3) == f"{model}:3", "no number was lost"
        await cluster.outcome(f"{model}:3")
        cluster.check_journal()


async def test_a_model_is_made_once_under_a_key(autojump_clock: MockClock, tmp_path: Path) -> None:
    """Which its session makes the tenant's, for the key is also that of the session."""
    async with Cluster.running(tmp_path) as cluster:

        async def make(rank: int, tenant: str = TENANT) -> str:
            session = (await cluster.ask(messages.CreateSession(tenant, idempotency_key="a"))).id
            model = ids.model_id(session, 0)
            body = json(
                session_id=session,
                model_seq_id=0,
                base_model="sim/model",
                lora_config={"rank": rank},
            )
            ask = messages.SubmitTraining(
                tenant, "create_model", session, model, 0, body, model_seq_id=0, key="a"
            )
            return str((await cluster.ask(ask)).request_id)

        first = await make(4)
        assert await make(4) == first
        assert await make(4, "bob") != first
        cluster.crash_worker()
        await cluster.start_worker()
        assert await make(4) == first
        with pytest.raises(UserError, match="another request"):
            await make(8)
        assert (await cluster.outcome(first)).state == "done"
        cluster.check_journal()


async def test_a_number_that_was_given_is_not_taken_for_that_of_a_client_that_counts(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Else that one would be told of another's job as if it were its own."""
    async with Cluster.running(tmp_path) as cluster:
        model = await cluster.create(await cluster.session())
        given = await _batch(cluster, model, 1)
        for _ in range(2):  # open, and ended
            with pytest.raises(UserError, match=r"the number 1 of .* a forward_backward: count on from 2"):
                await cluster.submit(model, 1, "forward_backward", b"batch 1")
            await cluster.outcome(given)
        assert (await cluster.submit(model, 2, "forward_backward", b"batch 2")).request_id == f"{model}:2"
        assert await _batch(cluster, model, 3) == f"{model}:3"
        # Behind what waits for a number that has not come, too.
        await cluster.submit(model, 6, "forward_backward", b"batch 6")
        assert await _batch(cluster, model, 7) == f"{model}:7"
        cluster.check_journal()


async def test_a_job_without_a_number_that_cannot_be_accepted_takes_none(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        model = await cluster.create(await cluster.session())
        for key in (None, "a"):
            with pytest.raises(TooLarge, match="over the limit"):
                await cluster.submit(model, None, "optim_step", b" " * (MAX_COMMAND_BODY + 1), key=key)
        with pytest.raises(NotFound):
            await cluster.submit(f"{model}0", None, "optim_step", json(model_id=model))
        assert cluster.router is not None
        assert f"{model}0" not in cluster.router.lanes
        assert await _batch(cluster, model, 1, "a") == f"{model}:1"
        # One that counts to the end leaves none, and the worker as it was.
        await cluster.submit(model, MAX_SEQ, "forward_backward", b"the last one")
        with pytest.raises(UserError, match="has no numbers left"):
            await _batch(cluster, model, 2)
        assert (await cluster.outcome(f"{model}:{MAX_SEQ}")).state == "done"
        with pytest.raises(UserError, match="has no numbers left"):
            await _batch(cluster, model, 2)
        cluster.check_journal()


async def test_a_sample_under_a_key_is_drawn_once_whatever_has_become_of_its_model(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        session = await cluster.session()
        samplers = [
            (await cluster.ask(messages.CreateSampler(TENANT, session, number, base_model="sim/model"))).id
            for number in range(2)
        ]

        async def sample(sampler: int, token: int = 1, key: str | None = "a") -> str:
            body = json(
                prompt={"chunks": [{"type": "encoded_text", "tokens": [token]}]},
                sampling_params={"max_tokens": 4},
            )
            ask = messages.SubmitSample(TENANT, samplers[sampler], None, body, key=key)
            return str((await cluster.ask(ask)).request_id)

        first = await sample(0)
        assert await sample(0) == await sample(1) == first
        result = await cluster.outcome(first)
        for _ in range(2):
            assert await sample(1) == first
            with pytest.raises(UserError, match=f"another request, the sample {first}"):
                await sample(0, 2)
            assert await cluster.outcome(first) == result
            cluster.crash_worker()
            await cluster.start_worker()
        others = {await sample(0, key=None), await sample(0, key=None), await sample(0, key="b"), first}
        assert len(others) == 4
        cluster.check_journal()


async def test_the_newest_weights_are_those_of_the_last_job_that_came(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        model = await cluster.create(await cluster.session())

        async def newest() -> tuple[str, int]:
            job = await cluster.ask(messages.GetWeights(TENANT, model))
            return job.op, job.seq_id

        assert await newest() == ("create_model", 0)
        await _batch(cluster, model, 1)
        await cluster.submit(model, None, "forward", b"batch 2")
        assert await newest() == ("forward_backward", 1)
        await _step(cluster, model, 0.5)
        await cluster.submit(model, None, "save_weights_for_sampler", json(model_id=model, path="x"))
        await cluster.submit(model, None, "save_weights", json(model_id=model, path="x"))
        assert await newest() == ("save_weights_for_sampler", 4)
        with pytest.raises(NotFound):
            await cluster.ask(messages.GetWeights("bob", model))


async def test_the_check_would_notice_a_number_that_is_given_twice(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What these tests rest on: a Router that forgets its keys is found out."""

    async def forgetful(self: Router, ask: messages.SubmitTraining, key: str) -> messages.Promise:
        return await self._submit_as(ask, self._next_number(ask), f"{key} {self._world.new_id()}")

    monkeypatch.setattr(Router, "_submit_once", forgetful)
    with pytest.RaisesGroup(pytest.RaisesExc(AssertionError, match="X4: a of")):
        async with Cluster.running(tmp_path) as cluster:
            model = await cluster.create(await cluster.session())
            await _batch(cluster, model, 1, "a")
            await _batch(cluster, model, 1, "a")
