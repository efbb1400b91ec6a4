"""Whose turn it is where one training job runs at a time."""

from __future__ import annotations

import sqlite3
import statistics
from contextlib import closing
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.simulation.cluster import Cluster
from tests.simulation.scenario import answers, batch, slow, step, train
from tests.users.trial import FAIR, p95, step_waits

SECONDS = 5.0
STEPS = 10


async def _models(cluster: Cluster, count: int) -> list[str]:
    session = await cluster.session()
    models = [await cluster.create(session, number) for number in range(count)]
    await answers(cluster, [f"{model}:0" for model in models])
    return models


@pytest.mark.parametrize(
    "many_at_once", [False, True], ids=["all one call after another", "one all at once"]
)
async def test_nobody_waits_twice_as_long_for_a_step_as_the_others(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many_at_once: bool
) -> None:
    slow(monkeypatch, SECONDS, lambda arguments: "ForwardBackward(" in arguments)
    async with Cluster.running(tmp_path, max_workers=1) as cluster:
        greedy, *others = await _models(cluster, 4)

        async def use(model: str) -> None:
            for seq in range(1, 2 * STEPS, 2):
                await answers(cluster, [await batch(cluster, model, seq)])
                await answers(cluster, [await step(cluster, model, seq + 1)])

        if many_at_once:
            await train(cluster, greedy, 1, 4 * STEPS)
        else:
            others.append(greedy)
        async with trio.open_nursery() as nursery:
            for model in others:
                nursery.start_soon(use, model)
        with closing(sqlite3.connect(cluster.home.journal)) as journal:
            query = "SELECT op, queue_ms FROM jobs WHERE model_id = ? AND seq_id > 0 ORDER BY seq_id"
            waits = [step_waits(journal.execute(query, (model,))) for model in others]
    assert [len(one) for one in waits] == [STEPS] * len(others)
    assert max(map(p95, waits)) <= FAIR * statistics.fmean(wait for one in waits for wait in one)
    # Three others' batches, once, and one that was ahead of its turn.
    assert max(map(max, waits)) < 1.1 * 4 * SECONDS * 1000


async def test_who_sends_nothing_but_steps_has_no_more_than_its_turn(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch, SECONDS, lambda arguments: "OptimStep(" in arguments)
    async with Cluster.running(tmp_path, max_workers=1) as cluster:
        many, other = await _models(cluster, 2)
        steps = [await step(cluster, many, seq) for seq in range(1, 2 * STEPS)]
        batches = [await batch(cluster, other, seq) for seq in range(1, STEPS)]
        await answers(cluster, steps + batches)
        with closing(sqlite3.connect(cluster.home.journal)) as journal:
            order = [
                model
                for (model,) in journal.execute(
                    "SELECT model_id FROM jobs WHERE seq_id > 0 ORDER BY started_at"
                )
            ]
    last = max(index for index, model in enumerate(order) if model == other)
    assert order[:last].count(many) <= STEPS
