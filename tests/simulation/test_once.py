"""One terminal event a job and no job forgotten, at the moments where two things meet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from tests.simulation.cluster import TENANT, Cluster
from tests.simulation.doubles import SimulatedWorld
from tink.actors import megatron, sampler
from tink.domain import ids, messages
from tink.domain.events import JobAccepted, JobCancelled, JobDone, Subject
from tink.limits import SEQ_GAP_SECONDS

PROMPT = msgspec.json.encode({"prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]}})


async def _sampler(cluster: Cluster) -> str:
    session = await cluster.session()
    created: messages.Created = await cluster.ask(
        messages.CreateSampler(TENANT, session, 0, base_model="sim/model")
    )
    return created.id


def _slow_commits(monkeypatch: pytest.MonkeyPatch, kind: type, seconds: float) -> None:
    """A commit with such an event takes `seconds`: a disk that is busy just then."""
    run_sync = SimulatedWorld.run_sync

    async def slow(
        self: SimulatedWorld,
        fn: Callable[..., Any],
        *args: Any,
        limiter: trio.CapacityLimiter | None = None,
    ) -> Any:
        if (
            args
            and isinstance(args[0], list)
            and any(isinstance(entry, tuple) and isinstance(entry[1], kind) for entry in args[0])
        ):
            with trio.CancelScope(shield=True):
                await trio.sleep(seconds)
        return await run_sync(self, fn, *args, limiter=limiter)

    monkeypatch.setattr(SimulatedWorld, "run_sync", slow)


async def test_a_sample_that_is_cancelled_twice_at_once_ends_once(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _slow_commits(monkeypatch, JobCancelled, 5.0)
    async with Cluster.running(tmp_path) as cluster:
        owner = await _sampler(cluster)
        cluster.trainer.kill()
        jobs = [
            (await cluster.ask(messages.SubmitSample(TENANT, owner, seq, PROMPT))).request_id
            for seq in range(4)
        ]
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(cluster.router_ask, messages.CancelJob(TENANT, jobs[-1]))
        await cluster.start_trainer()
        for job in jobs:
            await cluster.outcome(job)
        assert (await cluster.outcome(jobs[-1])).state == "cancelled"
        cluster.check_journal()


@pytest.mark.parametrize("victim", ["train", "sample"])
@pytest.mark.parametrize("moment", ["before", "during", "after"])
async def test_an_actor_that_crashes_around_the_end_of_a_job_ends_it_once_and_goes_on(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str, moment: str
) -> None:
    """A crash of one job's task cancels those of the others: one whose terminal event is being committed
    may be taken up again only once that is decided, and the router hears of it in the end."""
    if moment == "during":
        _slow_commits(monkeypatch, JobDone, 3.0)
    actor = megatron.MegatronActor if victim == "train" else sampler.SamplerActor
    crash = trio.Event()
    original = actor.run

    async def run(self: Any) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(original, self)
            if not crash.is_set():
                nursery.start_soon(_crash_on, crash)

    monkeypatch.setattr(actor, "run", run)
    async with Cluster.running(tmp_path) as cluster:
        owner = await _sampler(cluster)
        model = await cluster.create(await cluster.session())
        await cluster.outcome(f"{model}:0")
        jobs = []
        for seq in range(1, 5):
            if victim == "train":
                jobs.append((await cluster.submit(model, seq, "forward_backward", b"x")).request_id)
            else:
                jobs.append(
                    (await cluster.ask(messages.SubmitSample(TENANT, owner, seq, PROMPT))).request_id
                )
        if moment == "after":
            # When the first one is durable, and before anyone else has done a thing.
            assert cluster.journal is not None
            apply = cluster.journal._apply

            def apply_and_crash() -> None:
                apply()
                if cluster.journal is not None and jobs[0] in cluster.journal.present._recent:
                    crash.set()

            cluster.journal._commits._then = apply_and_crash
        elif moment == "during":
            await trio.sleep(1.0)
            crash.set()
        else:
            crash.set()
        with trio.fail_after(600):
            for job in jobs:
                assert (await cluster.outcome(job)).state == "done"
        cluster.check_journal()


async def _crash_on(event: trio.Event) -> None:
    await event.wait()
    raise RuntimeError("a bug")


async def test_a_job_that_came_too_late_is_ended_by_the_next_worker_if_not_by_this_one(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Accepted behind its gap, and the worker dies before it has said so."""
    async with Cluster.running(tmp_path) as cluster:
        model = await cluster.create(await cluster.session())
        await cluster.submit(model, 3, "forward_backward", b"batch 3")
        await cluster.outcome(f"{model}:3")
        assert cluster.journal is not None
        late = Subject(
            tenant=TENANT,
            session_id=model.partition(":")[0],
            model_id=model,
            job_id=ids.job_id(model, 2),
        )
        await cluster.journal.append((late, JobAccepted(op="forward_backward", seq_id=2)))
        cluster.crash_worker()
        await cluster.start_worker()
        with trio.fail_after(10 * SEQ_GAP_SECONDS):
            outcome = await cluster.outcome(ids.job_id(model, 2))
        assert (outcome.state, outcome.category) == ("failed", "user")
        assert "skipped" in str(outcome.error)
        await cluster.submit(model, 4, "forward_backward", b"batch 4")
        assert (await cluster.outcome(f"{model}:4")).state == "done"
        cluster.check_journal()
