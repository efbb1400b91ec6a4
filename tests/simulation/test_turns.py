"""Whose turn it is where one training job runs at a time."""

from __future__ import annotations

import sqlite3
import statistics
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
import trio
from trio.testing import MockClock

from tests.simulation.cluster import Cluster
from tests.simulation.scenario import answers, batch, slow, step, train
from tests.users.trial import FAIR, p95

SECONDS = 5.0
STEPS = 10


class Ran(NamedTuple):
    model: str
    op: str
    waited: float  # s


async def _models(cluster: Cluster, count: int) -> list[str]:
    session = await cluster.session()
    models = [await cluster.create(session, number) for number in range(count)]
    await answers(cluster, [f"{model}:0" for model in models])
    return models


def _ran(cluster: Cluster) -> list[Ran]:
    """In the order in which they ran, but for the jobs that made the models."""
    with closing(sqlite3.connect(cluster.home.journal)) as journal:
        rows = journal.execute(
            "SELECT model_id, op, queue_ms / 1000 FROM jobs WHERE seq_id > 0 ORDER BY started_at"
        )
        return [Ran(*row) for row in rows]


@pytest.mark.parametrize("ahead", [False, True], ids=["one call after another", "all calls at once"])
async def test_a_step_waits_for_one_batch_of_the_others_and_no_more(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    slow(monkeypatch, SECONDS, lambda arguments: "ForwardBackward(" in arguments)
    async with Cluster.running(tmp_path, max_workers=1) as cluster:
        models = await _models(cluster, 4)

        async def use(model: str) -> None:
            if ahead:
                await answers(cluster, await train(cluster, model, 1, STEPS))
                return
            for seq in range(1, 2 * STEPS, 2):
                await answers(cluster, [await batch(cluster, model, seq)])
                await answers(cluster, [await step(cluster, model, seq + 1)])

        async with trio.open_nursery() as nursery:
            for model in models:
                nursery.start_soon(use, model)
        ran = _ran(cluster)
    for index, (model, op, _) in enumerate(ran):
        if op == "optim_step":
            batches = [one.model for one in ran[:index] if one.op == "forward_backward"]
            assert model in batches[-2:]
    if not ahead:
        waits = [[one.waited for one in ran if one.model == model] for model in models]
        whole = [[sum(pair) for pair in zip(one[::2], one[1::2], strict=True)] for one in waits]
        assert max(map(p95, whole)) <= FAIR * statistics.fmean(wait for one in whole for wait in one)


async def test_who_sends_nothing_but_steps_has_no_more_than_its_turn(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch, SECONDS, lambda arguments: "OptimStep(" in arguments)
    async with Cluster.running(tmp_path, max_workers=1) as cluster:
        many, other = await _models(cluster, 2)
        steps = [await step(cluster, many, seq) for seq in range(1, 2 * STEPS)]
        batches = [await batch(cluster, other, seq) for seq in range(1, STEPS)]
        await answers(cluster, steps + batches)
        order = [one.model for one in _ran(cluster)]
    last = max(index for index, model in enumerate(order) if model == other)
    assert order[:last].count(many) <= STEPS
