"""The clients of a soak: sessions that come and go for ever, each with a model that is made, trained,
sampled, saved and unloaded. They ask the Router, as the HTTP side does."""

from __future__ import annotations

import math
import os
import random
import time
from array import array
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import trio

from tests.null_servers import MODEL
from tink.domain import ids, keys, messages
from tink.domain.requests import DATA_OPS, OpName
from tink.world import World

Ask = Callable[[messages.Question], Awaitable[Any]]

TENANTS = ("alice", "bob", "carol")
BODY_BYTES, PROMPT_TOKENS, MAX_TOKENS = 2000, 24, 16
# One submission in so many is sent twice, as if its answer had been lost; one session in so many has a
# client that counts nothing, and knows its jobs by keys; and one begins with what another one has saved.
REPEATED, KEYED, LOADED = 50, 10, 5


class Clients:
    """`at_once`: sessions that are open at any time. `ttl`: seconds, of the state that each leaves behind.
    `accepted`, `ended`: of each job of the last `work`, the seconds until its promise, and until its
    outcome."""

    def __init__(self, ask: Ask, world: World, *, seed: int, at_once: int, ttl: int) -> None:
        self.ask, self.world, self.ttl = ask, world, ttl
        self._seed, self._at_once = seed, at_once
        self.accepted, self.ended = array("d"), array("d")
        self.jobs = self.sessions = 0
        # tenant -> when, and which state was saved last, for others to begin with.
        self.saved: dict[str, tuple[float, str]] = {}
        self._left = self._open = 0
        self._ending = False
        self._more, self._done = trio.Event(), trio.Event()

    async def run(self) -> None:
        """For ever; once the end has begun, until every session is finished."""
        async with trio.open_nursery() as nursery:
            for _ in range(self._at_once):
                nursery.start_soon(self._come_and_go)

    async def _come_and_go(self) -> None:
        while not self._ending:
            self.sessions += 1
            await Session(self, random.Random(f"{self._seed} {self.sessions}")).run()

    async def work(self, jobs: int) -> None:
        """Has so many jobs submitted, and returns when they have ended. The sessions stay as they are."""
        del self.accepted[:], self.ended[:]
        self._left, self._done = jobs, trio.Event()
        self._more.set()
        self._more = trio.Event()
        await self._done.wait()

    def end(self) -> None:
        """No new sessions; those that are open are brought to their end, whatever that takes."""
        self._ending = True
        self._more.set()

    async def turn(self) -> None:
        """Returns when one more job may be submitted."""
        while not self._left and not self._ending:
            await self._more.wait()
        self._left -= 1
        self._open += 1
        self.jobs += 1

    def settle(self, accepted: float, ended: float) -> None:
        """A job has."""
        self.accepted.append(accepted)
        self.ended.append(ended)
        self._open -= 1
        if not self._left and not self._open:
            self._done.set()


class Session:
    """One client's, with one model, from its making to its end."""

    def __init__(self, clients: Clients, rng: random.Random) -> None:
        self._clients, self._rng, self._ask = clients, rng, clients.ask
        self._tenant = rng.choice(TENANTS)
        self._keyed = not rng.randrange(KEYED)
        self._session = self._model = ""
        self._seq = self._samplers = self._samples = 0

    async def run(self) -> None:
        rng, tenant = self._rng, self._tenant
        created = await self._ask(
            messages.CreateSession(tenant, tags=["soak"], idempotency_key=f"{rng.getrandbits(64):x}")
        )
        self._session, self._model = created.id, ids.model_id(created.id, 0)
        await self._make()
        base = await self._sampler(base_model=MODEL)
        kept: set[str] = set()
        for step in range(rng.randint(4, 12)):
            await self._step()
            if step % 3 == 2:
                await self._sample(await self._weights(), 8)
            if not rng.randrange(4):
                kept.add(await self._save("save_weights", "last", overwrite=True))
            if not rng.randrange(8):
                path = await self._save("save_weights_for_sampler", "best", overwrite=True)
                kept.add(path)
                await self._sample(await self._sampler(model_path=path), 2)
            await self._ask(messages.Heartbeat(tenant, self._session))
        await self._sample(base, 2)
        for path in kept:
            await self._ask(messages.DeleteCheckpoint(tenant, path))
        path = await self._save("save_weights", "final", ttl_seconds=self._clients.ttl)
        self._clients.saved[tenant] = self._clients.world.monotonic(), path
        await self._run("unload_model", keys.UNLOAD, model_id=self._model)
        await self._ask(messages.FinishSession(tenant, self._session, "done"))

    # -- what it does -------------------------------------------------------------------------------

    async def _make(self) -> None:
        await self._clients.turn()
        fields: dict[str, Any] = {"session_id": self._session, "model_seq_id": 0}
        saved_at, path = self._clients.saved.get(self._tenant, (-math.inf, ""))
        # What is about to expire could be gone when its turn comes.
        if (
            not self._rng.randrange(LOADED)
            and self._clients.world.monotonic() - saved_at < self._clients.ttl / 2
        ):
            await self._end(self._request("load_weights", path=path, optimizer=True, **fields))
        else:
            lora = {"rank": 8, "seed": self._rng.getrandbits(31)}
            await self._end(self._request("create_model", base_model=MODEL, lora_config=lora, **fields))

    async def _step(self) -> None:
        """Sent as a whole, and in any order, before its first answer has come, as the SDK does."""
        ops: list[OpName] = ["forward_backward"] * self._rng.randint(1, 4)
        async with trio.open_nursery() as nursery:
            for op in (*ops, "optim_step"):
                nursery.start_soon(self._end, await self._training(op))
        if not self._rng.randrange(8):
            await self._run("forward")

    async def _weights(self) -> str:
        """What the model is now, for a sampler."""
        self._samplers += 1
        result = await self._run("save_weights_for_sampler", sampling_session_seq_id=self._samplers)
        return str(result["sampling_session_id"])

    async def _save(self, op: OpName, name: str, **fields: Any) -> str:
        return str((await self._run(op, path=name, **fields))["path"])

    async def _sampler(self, **source: str) -> str:
        self._samplers += 1
        ask = messages.CreateSampler(self._tenant, self._session, self._samplers, **source)
        return str((await self._ask(ask)).id)

    async def _sample(self, sampler: str, count: int) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(count):
                await self._clients.turn()
                prompt = [self._rng.getrandbits(15) for _ in range(PROMPT_TOKENS)]
                chunks = [{"type": "encoded_text", "tokens": prompt}]
                body = {"prompt": {"chunks": chunks}, "sampling_params": {"max_tokens": MAX_TOKENS}}
                self._samples += 1
                seq, key = self._number(self._samples)
                ask = messages.SubmitSample(self._tenant, sampler, seq, msgspec.json.encode(body), key=key)
                nursery.start_soon(self._end, ask)

    # -- jobs ---------------------------------------------------------------------------------------

    async def _run(self, op: OpName, key: str | None = None, **fields: Any) -> dict[str, Any]:
        """What the job answers in JSON."""
        return await self._end(await self._training(op, key, **fields)) or {}

    async def _training(self, op: OpName, key: str | None = None, **fields: Any) -> messages.SubmitTraining:
        """The model's next job, once it may be submitted: what is given a number must come."""
        await self._clients.turn()
        return self._request(op, key, **fields)

    def _request(self, op: OpName, key: str | None = None, **fields: Any) -> messages.SubmitTraining:
        number, self._seq = self._seq, self._seq + 1
        # The job that makes a model has a number whoever its client is.
        seq, key = (number, None) if not number else (None, key) if key else self._number(number)
        data = op in DATA_OPS
        return messages.SubmitTraining(
            self._tenant,
            op=op,
            session_id=self._session,
            model_id=self._model,
            seq_id=seq,
            model_seq_id=None if number else 0,
            body=os.urandom(BODY_BYTES)
            if data
            else msgspec.json.encode({"model_id": self._model, **fields}),
            key=key,
        )

    def _number(self, number: int) -> tuple[int | None, str | None]:
        """By which a job is known: its number, or its key."""
        return (None, keys.client(f"{self._session} {number}")) if self._keyed else (number, None)

    async def _end(self, ask: messages.SubmitTraining | messages.SubmitSample) -> dict[str, Any] | None:
        """Submits the job, and waits until it has ended, which must be well."""
        began = time.perf_counter()
        promise: messages.Promise = await self._ask(ask)
        accepted = time.perf_counter()
        if not self._rng.randrange(REPEATED):
            again = await self._ask(ask)
            assert again == promise, f"{again} is not the first promise, {promise}"
        outcome: messages.Outcome = await self._ask(messages.AwaitOutcome(self._tenant, promise.request_id))
        assert outcome.state == "done", f"{promise.request_id}: {outcome.error}"
        self._clients.settle(accepted - began, time.perf_counter() - began)
        return outcome.result
