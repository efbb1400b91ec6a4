"""Jobs that begin with their acceptance."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.simulation.cluster import Cluster
from tests.simulation.scenario import answers, batch, crash_and_restart, json, slow, step, train

OP_SECONDS = 5.0


def begun_at_once(cluster: Cluster) -> set[str]:
    """The jobs that were accepted and begun in one commit."""
    with closing(sqlite3.connect(cluster.home.journal)) as journal:
        found = journal.execute(
            "SELECT a.job_id FROM events a JOIN events s ON s.job_id = a.job_id AND s.seq = a.seq + 1 "
            "WHERE a.kind = 'job_accepted' AND s.kind = 'job_started' AND s.at = a.at"
        )
        return {job_id for (job_id,) in found}


async def _model(cluster: Cluster, number: int = 0) -> str:
    model = await cluster.create(await cluster.session(), number)
    await answers(cluster, [f"{model}:0"])
    return model


async def test_a_batch_or_a_step_that_nothing_is_before_is_accepted_and_begun_in_one_commit(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        model = await _model(cluster)
        alone = []
        for send, seq in ((batch, 1), (step, 2), (batch, 3), (step, 4)):
            await trio.sleep(1)  # what was before is done with
            alone.append(await send(cluster, model, seq))
            await answers(cluster, alone)
        saved = (await cluster.submit(model, 5, "save_weights", json(model_id=model, path="a"))).request_id
        await answers(cluster, [saved])
        cluster.check_journal()
        assert begun_at_once(cluster) == set(alone)


async def test_what_has_to_wait_is_only_accepted(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For one of its own model, for a slot, for a number that has not come, for a server."""
    slow(monkeypatch, OP_SECONDS, lambda arguments: "ForwardBackward(" in arguments)
    async with Cluster.running(tmp_path, max_workers=1) as cluster:
        one, other = await _model(cluster), await _model(cluster, 1)
        await trio.sleep(1)
        first = await batch(cluster, one, 1)
        behind, beside = await batch(cluster, one, 2), await batch(cluster, other, 1)
        await answers(cluster, [first, behind, beside])
        await trio.sleep(1)
        early, late = await batch(cluster, one, 4), await batch(cluster, one, 3)
        await answers(cluster, [early, late])
        cluster.trainer.kill()
        await cluster.submit(one, 5, "save_weights", json(model_id=one, path="a"))  # finds it gone
        nobody = await batch(cluster, other, 2)
        await cluster.start_trainer()
        await answers(cluster, [nobody])
        cluster.check_journal()
        assert begun_at_once(cluster) >= {first, late}
        assert begun_at_once(cluster).isdisjoint({behind, beside, early})


async def test_what_cannot_be_served_does_not_begin(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with Cluster.running(tmp_path) as cluster:
        model = await _model(cluster)
        await trio.sleep(1)
        body = json(model_id=model, adam_params={"learning_rate": -1.0})
        wrong = await cluster.submit(model, 1, "optim_step", body)
        found = await answers(cluster, [wrong.request_id])
        await trio.sleep(1)
        await answers(cluster, [await step(cluster, model, 2)])
        cluster.check_journal()
        assert "cannot be negative" in str(found[0])
        assert begun_at_once(cluster) == {f"{model}:2"}


@pytest.mark.parametrize("victim", ["worker", "trainer"])
async def test_a_crash_right_behind_such_a_beginning_changes_no_result(
    autojump_clock: MockClock, tmp_path: Path, victim: str
) -> None:
    async def run(folder: str, *, crash: bool) -> list[object]:
        async with Cluster.running(tmp_path / folder) as cluster:
            model = await _model(cluster)
            sent = await train(cluster, model, 1, 1)
            await answers(cluster, sent)
            await trio.sleep(1)
            sent += [await batch(cluster, model, 3)]
            if crash:
                await crash_and_restart(cluster, victim)
            sent += [await step(cluster, model, 4)]
            found = await answers(cluster, sent)
            cluster.check_journal()
            assert sent[2] in begun_at_once(cluster)
            return found

    assert await run("crashed", crash=True) == await run("undisturbed", crash=False)
