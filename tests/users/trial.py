"""The same users twice: one after another, and at once."""

from __future__ import annotations

import math
import sqlite3
import statistics
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import trio

from tests.users.user import CALL_SECONDS, Outcome, Work, remove, use

# A user's 95th percentile, over the mean of all.
FAIR = 2.0


@dataclass(frozen=True)
class Trial:
    """`alone` and `together`: the outcomes of each user, in order. `waits`: how long each user's training
    steps waited for others when all came at once (ms, from the journal); `most_running`: how many training
    jobs ran at one time. Both None if the journal is not ours."""

    alone: list[Outcome]
    together: list[Outcome]
    alone_seconds: float
    together_seconds: float
    waits: list[list[float]] | None = None
    most_running: int | None = None

    @property
    def succeeded(self) -> int:
        return sum(a.error is None and b.error is None for a, b in self._pairs())

    @property
    def identical(self) -> list[bool]:
        """Whether each user got at once, to the last bit, what it got alone."""
        return [a.error is None and b.error is None and a.answers == b.answers for a, b in self._pairs()]

    @property
    def speedup(self) -> float:
        return self.alone_seconds / self.together_seconds

    @property
    def unfairness(self) -> float | None:
        """The longest p95 of a user over the mean of all."""
        if not self.waits or not all(self.waits):
            return None
        mean = statistics.fmean(wait for waits in self.waits for wait in waits)
        return max(map(p95, self.waits)) / mean

    def _pairs(self) -> Iterable[tuple[Outcome, Outcome]]:
        return zip(self.alone, self.together, strict=True)


async def hold(client: httpx.AsyncClient, work: Work, users: int) -> Trial:
    # Nobody is to pay for what a server does once.
    await remove(client, await use(client, replace(work, steps=1), 0))
    numbers = range(1, users + 1)

    started = time.perf_counter()
    alone = [await use(client, work, number) for number in numbers]
    alone_seconds = time.perf_counter() - started
    for outcome in alone:
        await remove(client, outcome)

    found: dict[int, Outcome] = {}

    async def one(number: int) -> None:
        found[number] = await use(client, work, number)

    started = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for number in numbers:
            nursery.start_soon(one, number)
    together_seconds = time.perf_counter() - started
    together = [found[number] for number in numbers]
    for outcome in together:
        await remove(client, outcome)
    return Trial(alone, together, alone_seconds, together_seconds)


def client(url: str, key: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=url,
        headers={"X-API-Key": key},
        timeout=CALL_SECONDS,
        limits=httpx.Limits(max_connections=None),
        trust_env=False,
    )


async def base_model(client: httpx.AsyncClient) -> str:
    answer = await client.get("/get_server_capabilities")
    return str(answer.raise_for_status().json()["supported_models"][0]["model_name"])


def with_journal(trial: Trial, journal: Path) -> Trial:
    """With what the worker wrote down of the users that came at once."""
    models = [outcome.model_id or "" for outcome in trial.together]
    with closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True)) as connection:
        waits = [
            step_waits(
                connection.execute(
                    "SELECT op, queue_ms FROM jobs WHERE model_id = ? AND queue_ms IS NOT NULL "
                    "AND op IN ('forward_backward', 'optim_step') ORDER BY seq_id",
                    (model,),
                )
            )
            for model in models
        ]
        events = connection.execute(
            "SELECT kind, model_id, job_id FROM events WHERE kind LIKE 'job_%' ORDER BY seq"
        )
        jobs = [(kind, job_id) for kind, model_id, job_id in events if model_id in models]
    return replace(trial, waits=waits, most_running=most_running(jobs))


def step_waits(jobs: Iterable[tuple[str, float]]) -> list[float]:
    """What each batch and the step behind it waited together, from the op and wait of a model's jobs in
    order. Not each alone: where one job runs at a time, who waited with the batch need not with the step,
    so that even with equal turns some jobs wait twice the mean of all."""
    waits: list[float] = []
    for op, wait in jobs:
        if op == "forward_backward":
            waits.append(wait)
        elif waits:
            waits[-1] += wait
    return waits


def most_running(events: Iterable[tuple[str, str]]) -> int:
    """Of the kind of each event and its job, in order."""
    running: set[str] = set()
    most = 0
    for kind, job_id in events:
        if kind == "job_started":
            running.add(job_id)
        elif kind in ("job_done", "job_failed", "job_cancelled"):
            running.discard(job_id)
        most = max(most, len(running))
    return most


def p95(values: list[float]) -> float:
    """The least that 95 of 100 do not exceed."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]
