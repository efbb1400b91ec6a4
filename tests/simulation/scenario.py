"""What the scenarios share: bodies, training loops, and a look into the journal."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import Any

import msgspec
import pytest
import trio

from tests.simulation.cluster import Cluster
from tests.simulation.doubles import SimulatedWorld


def json(**fields: object) -> bytes:
    return msgspec.json.encode(fields)


async def train(cluster: Cluster, model: str, first: int, steps: int) -> list[str]:
    """forward_backward + optim_step, `steps` times, from the sequence number `first`; the jobs' ids."""
    jobs = []
    for seq in range(first, first + 2 * steps, 2):
        jobs += [await batch(cluster, model, seq), await step(cluster, model, seq + 1)]
    return jobs


async def batch(cluster: Cluster, model: str, seq: int) -> str:
    return (await cluster.submit(model, seq, "forward_backward", f"batch {seq}".encode())).request_id


async def step(cluster: Cluster, model: str, seq: int) -> str:
    """Each with a learning rate of its own."""
    body = json(model_id=model, seq_id=seq, adam_params={"learning_rate": (seq - 1) / 1000})
    return (await cluster.submit(model, seq, "optim_step", body)).request_id


async def answers(cluster: Cluster, jobs: list[str]) -> list[object]:
    """What the client gets for each job, once it has ended."""
    outcomes = [await cluster.outcome(job) for job in jobs]
    return [outcome.body or outcome.result or outcome.error for outcome in outcomes]


async def long_run(cluster: Cluster, model: str, steps: int) -> list[object]:
    """`train` from the first number on, each step awaited before the next: there is time for snapshots."""
    found = []
    for seq in range(1, 2 * steps, 2):
        found += await answers(cluster, await train(cluster, model, seq, 1))
    return found


async def crash_and_restart(cluster: Cluster, victim: str) -> None:
    """The `worker`, the `trainer`, or `both` at once."""
    if victim != "trainer":
        cluster.crash_worker()
    if victim != "worker":
        cluster.trainer.kill()
    await cluster.start_trainer()
    await cluster.start_worker()


def events(cluster: Cluster, kind: str) -> list[dict[str, Any]]:
    """The data of all events of that kind."""
    with closing(sqlite3.connect(cluster.home.journal)) as journal:
        found = journal.execute("SELECT data FROM events WHERE kind = ? ORDER BY seq", (kind,))
        return [msgspec.json.decode(data) for (data,) in found]


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float, which: Callable[[str], bool]) -> None:
    """Work in threads that `which(repr of its arguments)` takes this much longer."""
    run_sync = SimulatedWorld.run_sync

    async def slowly(self: SimulatedWorld, fn: Any, *args: Any, **kwargs: Any) -> Any:
        if which(repr(args)):
            with trio.CancelScope(shield=True):
                await trio.sleep(seconds)
        return await run_sync(self, fn, *args, **kwargs)

    monkeypatch.setattr(SimulatedWorld, "run_sync", slowly)
