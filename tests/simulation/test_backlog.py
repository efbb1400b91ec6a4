"""A worker that starts with many open jobs runs them all, each model's in order."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from trio.testing import MockClock

from tests.simulation.cluster import TENANT, Cluster
from tests.simulation.scenario import answers, json, train
from tink.domain import messages

MODELS = 4


async def _begin(cluster: Cluster) -> tuple[str, list[str]]:
    """A sampler and some models."""
    session = await cluster.session()
    sampler = await cluster.ask(messages.CreateSampler(TENANT, session, 0, base_model="sim/model"))
    models = [await cluster.create(session, number) for number in range(MODELS)]
    for model in models:
        await cluster.outcome(f"{model}:0")
    return sampler.id, models


async def _submit(cluster: Cluster, sampler: str, models: list[str], steps: int) -> list[str]:
    """10 * `steps` jobs; their ids."""
    jobs = [job for model in models for job in await train(cluster, model, 1, steps)]
    prompt = json(prompt={"chunks": [{"type": "encoded_text", "tokens": [1]}]})
    for number in range(2 * steps):
        ask = messages.SubmitSample(TENANT, sampler, number, prompt, seed=number)
        jobs.append((await cluster.ask(ask)).request_id)
    return jobs


async def _after_a_crash(cluster: Cluster, steps: int) -> list[object]:
    """What the jobs give that a new worker finds open, all of them."""
    sampler, models = await _begin(cluster)
    cluster.trainer.kill()
    jobs = await _submit(cluster, sampler, models, steps)
    cluster.crash_worker()
    await cluster.start_worker()
    assert cluster.journal is not None
    assert len(cluster.journal.ledger.jobs) == len(jobs) == 10 * steps
    await cluster.start_trainer()
    found = await answers(cluster, jobs)
    cluster.check_journal()
    with closing(sqlite3.connect(cluster.home.journal)) as journal:
        ends = journal.execute("SELECT state, op_no - seq_id, count(*) FROM jobs GROUP BY 1, 2").fetchall()
    assert ends == [("done", None, 2 * steps), ("done", 1, MODELS * (2 * steps + 1))]
    return found


async def test_it_gives_what_an_undisturbed_worker_gives(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with Cluster.running(tmp_path / "calm") as cluster:
        expected = await answers(cluster, await _submit(cluster, *await _begin(cluster), 10))
    async with Cluster.running(tmp_path / "crashed") as cluster:
        assert await _after_a_crash(cluster, 10) == expected


@pytest.mark.slow
async def test_it_does_so_with_thousands(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with Cluster.running(tmp_path) as cluster:
        assert len(await _after_a_crash(cluster, 300)) == 3000
