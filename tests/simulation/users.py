"""A client of a simulated worker that samples by vLLM doubles, and what the worker says of these."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from functools import partial
from typing import Any

import pytest
import trio

from tests.simulation.cluster import TENANT, Cluster
from tests.simulation.scenario import answers, json, train
from tests.vllm.double import VllmDouble
from tink.actors import pool
from tink.actors.vllm import VLLMActor
from tink.domain import ids, messages
from tink.wire import tink_train

PROMPT = [1, 2, 3]


def servers(count: int, **options: Any) -> list[VllmDouble]:
    return [VllmDouble(**options) for _ in range(count)]


class User:
    """A client with one model."""

    def __init__(self, cluster: Cluster, session: str, model: str) -> None:
        self.cluster, self.session, self.model = cluster, session, model
        self.seq, self.samplers, self.asked = 0, list[str](), 0

    @classmethod
    async def begin(cls, cluster: Cluster, number: int = 0, **config: Any) -> User:
        session = await cluster.session()
        user = cls(cluster, session, await cluster.create(session, number, **config))
        assert (await cluster.outcome(f"{user.model}:0")).state == "done"
        return user

    async def train(self) -> None:
        await answers(self.cluster, await train(self.cluster, self.model, self.seq + 1, 1))
        self.seq += 2

    async def save(self) -> str:
        """New weights, and a sampler of them."""
        self.seq += 1
        number = len(self.samplers)
        body = json(model_id=self.model, seq_id=self.seq, sampling_session_seq_id=number)
        job = await self.cluster.submit(self.model, self.seq, "save_weights_for_sampler", body)
        outcome = await self.cluster.outcome(job.request_id)
        assert outcome.state == "done", outcome.error
        self.samplers.append(ids.sampler_id(self.session, number))
        return self.samplers[-1]

    async def save_named(self, name: str) -> None:
        """New weights, with a checkpoint's name and no sampler."""
        self.seq += 1
        body = json(model_id=self.model, seq_id=self.seq, path=name)
        job = await self.cluster.submit(self.model, self.seq, "save_weights_for_sampler", body)
        outcome = await self.cluster.outcome(job.request_id)
        assert outcome.state == "done", outcome.error

    async def ask(self, sampler: str, seed: int = 0, *, tokens: int = 4, n: int = 1, **fields: Any) -> str:
        """Returns the job."""
        self.asked += 1
        body = json(
            prompt={"chunks": [{"type": "encoded_text", "tokens": PROMPT}]},
            sampling_params={"seed": seed, "max_tokens": tokens},
            num_samples=n,
            **fields,
        )
        ask = messages.SubmitSample(TENANT, sampler, self.asked, body, num_samples=n)
        return (await self.cluster.ask(ask)).request_id

    async def sample(self, sampler: str, seed: int = 0, **params: int) -> bytes:
        outcome = await self.cluster.outcome(await self.ask(sampler, seed, **params))
        assert outcome.state == "done", outcome.error
        assert outcome.body is not None
        return outcome.body

    def right(self, sampler: str, seed: int = 0, *, tokens: int = 4, n: int = 1) -> bytes:
        """What the sampler's weights give, and no others."""
        with closing(sqlite3.connect(self.cluster.home.journal)) as journal:
            query = "SELECT directory FROM adapters JOIN samplers USING (adapter_id) WHERE sampler_id = ?"
            (directory,) = journal.execute(query, (sampler,)).fetchone()
        request = tink_train.SampleRequest("any", PROMPT, seed, max_tokens=tokens, num_samples=n)
        return VllmDouble().would_answer(request, self.cluster.trainer.artifacts / directory)


def placements(cluster: Cluster) -> dict[tuple[str, str], str]:
    """(version, server) -> state."""
    with closing(sqlite3.connect(cluster.home.journal)) as journal:
        found = journal.execute("SELECT adapter_id, replica, state FROM adapter_placements")
        return {
            (adapter.rpartition("@")[2], server.removeprefix("http://").partition(":")[0]): state
            for adapter, server, state in found
        }


async def up(cluster: Cluster, count: int) -> None:
    """Waits until so many servers take requests."""
    while True:
        health: messages.Health = await cluster.ask(messages.GetHealth(""))
        if (
            sum(state.startswith("ready") for url, state in health.servers.items() if "vllm" in url)
            == count
        ):
            return
        await trio.sleep(0.1)


@asynccontextmanager
async def restarting(vllm: Sequence[VllmDouble]) -> AsyncIterator[None]:
    """Somebody starts servers that are down."""

    async def restart() -> None:
        while True:
            await trio.sleep(5.0)
            for server in vllm:
                if not server.up:
                    server.start()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(restart)
        yield
        nursery.cancel_scope.cancel()


def with_room_for(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Every server is given so many adapters at most."""
    monkeypatch.setattr(pool, "VLLMActor", partial(VLLMActor, registered=count))
