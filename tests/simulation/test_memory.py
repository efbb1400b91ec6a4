"""A worker that runs for months holds what goes on, and nothing else; and what it has forgotten it tells as
if it had not."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from tests.simulation.cluster import TENANT, Cluster
from tests.simulation.scenario import json, slow, train
from tests.simulation.users import servers, up
from tink.domain import ids, keys, messages
from tink.errors import NotFound, SessionFinished, UserError
from tink.journal.bodies import BodyStore
from tink.journal.journal import Journal
from tink.journal.present import Present
from tink.limits import EXPIRY_SECONDS, FORGET_SECONDS, RETENTION_SECONDS

MODEL, KEY = "sim/model", "key of the session"


class Left:
    """A session that was finished, and what its client had of it."""

    def __init__(self, cluster: Cluster, session: str) -> None:
        self.cluster, self.session = cluster, session
        self.model = ids.model_id(session, 0)

    @classmethod
    async def by_a_client(cls, cluster: Cluster) -> Left:
        created: messages.Created = await cluster.ask(messages.CreateSession(TENANT, idempotency_key=KEY))
        left = cls(cluster, created.id)
        for question in (left.made, left.sampler, left.saved(1, sampling_session_seq_id=1)):
            await left.done(question)
        await train(cluster, left.model, 2, 6)
        await left.done(left.saved(14, path="named"))
        await left.done(left.sampler_of_named)
        for sampler in range(3):
            await left.done(left.sample(sampler, 0))
        await cluster.ask(messages.DeleteCheckpoint(TENANT, left.named))
        await left.done(left.unloaded)
        await cluster.ask(messages.FinishSession(TENANT, left.session, "done"))
        return left

    async def done(self, question: messages.Question) -> None:
        """If it is a job, that has ended well."""
        answer = await self.cluster.ask(question)
        if isinstance(answer, messages.Promise):
            outcome = await self.cluster.outcome(answer.request_id)
            assert outcome.state == "done", outcome.error

    @property
    def made(self) -> messages.Question:
        lora = {"rank": 4, "seed": 1}
        return self.job(0, "create_model", base_model=MODEL, lora_config=lora, model_seq_id=0)

    @property
    def sampler(self) -> messages.Question:
        return messages.CreateSampler(TENANT, self.session, 0, base_model=MODEL)

    def saved(self, seq: int, **fields: Any) -> messages.Question:
        return self.job(seq, "save_weights_for_sampler", **fields)

    @property
    def named(self) -> str:
        return f"tinker://{self.model}/sampler_weights/named"

    @property
    def sampler_of_named(self) -> messages.Question:
        return messages.CreateSampler(TENANT, self.session, 2, model_path=self.named)

    def sample(self, sampler: int, seq: int, tenant: str = TENANT) -> messages.Question:
        body = json(
            prompt={"chunks": [{"type": "encoded_text", "tokens": [1]}]}, sampling_params={"max_tokens": 4}
        )
        return messages.SubmitSample(tenant, ids.sampler_id(self.session, sampler), seq, body, seed=1)

    @property
    def unloaded(self) -> messages.Question:
        return self.job(None, "unload_model", keys.UNLOAD)

    def job(
        self, seq: int | None, op: Any, key: str | None = None, tenant: str = TENANT, **fields: Any
    ) -> messages.Question:
        body = {"model_id": self.model, "session_id": self.session, **fields}
        number = fields.get("model_seq_id")
        return messages.SubmitTraining(
            tenant,
            op=op,
            session_id=self.session,
            model_id=self.model,
            seq_id=seq,
            model_seq_id=number,
            body=msgspec.json.encode(body),
            key=key,
        )

    @property
    def questions(self) -> list[messages.Question]:
        """About each thing of it, and repeats of what was asked, and what comes too late."""
        session, model = self.session, self.model
        stranger = "somebody else"
        return [
            messages.CreateSession(TENANT, idempotency_key=KEY),
            messages.Heartbeat(TENANT, session),
            messages.FinishSession(TENANT, session, "again"),
            messages.GetSession(TENANT, session),
            messages.ListSessions(TENANT),
            self.made,
            self.sampler,
            self.saved(1, sampling_session_seq_id=1),
            self.sampler_of_named,
            self.unloaded,
            *(self.sample(sampler, 0) for sampler in range(3)),
            messages.GetSampler(TENANT, ids.sampler_id(session, 1)),
            messages.GetModel(TENANT, model),
            messages.GetWeights(TENANT, model),
            messages.ListModels(TENANT),
            messages.ListCheckpoints(TENANT, model),
            messages.Heartbeat(stranger, session),
            messages.GetSampler(stranger, ids.sampler_id(session, 1)),
            messages.ListCheckpoints(stranger, model),
            self.sample(1, 1, stranger),
            self.job(17, "optim_step", tenant=stranger),
        ]

    async def answers(self) -> list[Any]:
        """To all of these, and the outcomes of jobs."""
        found: list[Any] = []
        for question in self.questions:
            try:
                answer = await self.cluster.ask(question)
                found.append(answer)
                if isinstance(answer, messages.Promise):
                    found.append(await self.cluster.outcome(answer.request_id))
            except (NotFound, SessionFinished, UserError) as error:
                found.append((type(error), str(error)))
        return found


async def ended_and_forgotten() -> None:
    await trio.sleep(RETENTION_SECONDS + 2 * EXPIRY_SECONDS + 2 * FORGET_SECONDS)


def in_memory(cluster: Cluster) -> int:
    """Rows of sessions, models and samplers."""
    assert cluster.journal is not None
    ledger = cluster.journal.ledger
    return len(ledger.sessions) + len(ledger.models) + len(ledger.samplers)


@pytest.mark.parametrize("restarted", [False, True])
async def test_what_was_forgotten_is_told_as_before(
    autojump_clock: MockClock, tmp_path: Path, restarted: bool
) -> None:
    async with Cluster.running(tmp_path, keep_adapters_hours=1.0) as cluster:
        left = await Left.by_a_client(cluster)
        before = await left.answers()
        await ended_and_forgotten()
        if restarted:
            cluster.crash_worker()
            await cluster.start_worker()
        assert in_memory(cluster) == 0
        assert await left.answers() == before
        await ended_and_forgotten()
        assert in_memory(cluster) == 0
        cluster.check_journal()


async def test_work_for_what_was_forgotten_ends_as_it_would_have(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path, keep_adapters_hours=1.0) as cluster:
        left = await Left.by_a_client(cluster)
        await ended_and_forgotten()
        # The base model is there; nobody waits for numbers that have come.
        questions = [left.sample(0, 1), left.sample(1, 1), left.made, left.job(16, "optim_step")]
        with trio.fail_after(60.0):
            promises = [await cluster.ask(question) for question in questions]
            outcomes = [await cluster.outcome(promise.request_id) for promise in promises]
        assert [outcome.state for outcome in outcomes] == ["done", "failed", "done", "failed"]
        assert "their model was unloaded" in (outcomes[1].error or "")
        assert "was unloaded" in (outcomes[3].error or "")
        # And a model that is made there now is one like any other.
        model = await cluster.create(left.session, 1)
        for job in await train(cluster, model, 1, 2):
            assert (await cluster.outcome(job)).state == "done"
        cluster.check_journal()


@pytest.mark.parametrize("by", ["a save", "a client"])
async def test_the_number_of_a_sampler_that_was_forgotten_is_taken(
    autojump_clock: MockClock, tmp_path: Path, by: str
) -> None:
    async with Cluster.running(tmp_path, keep_adapters_hours=1.0) as cluster:
        session = await cluster.session()
        model = await cluster.create(session)
        for seq in (1, 2):
            await cluster.outcome(f"{model}:{seq - 1}")
            save = json(model_id=model, seq_id=seq, sampling_session_seq_id=7)
            await cluster.submit(model, seq, "save_weights_for_sampler", save)
            outcome = await cluster.outcome(f"{model}:{seq}")
            if seq == 1:
                assert outcome.state == "done"
                await trio.sleep(RETENTION_SECONDS)
                await ended_and_forgotten()
                assert in_memory(cluster) == 2
                if by == "a client":
                    break
        sampler = ids.sampler_id(session, 7)
        if by == "a save":
            assert f"the sampler {sampler} exists already" in (outcome.error or "")
        else:
            again: messages.Created = await cluster.ask(
                messages.CreateSampler(TENANT, session, 7, base_model=MODEL)
            )
            assert again.id == sampler
        cluster.check_journal()


async def test_what_is_asked_about_is_not_forgotten_meanwhile(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch, 3 * FORGET_SECONDS, lambda arguments: "SessionMoved" in arguments)
    async with Cluster.running(tmp_path) as cluster:
        session = await cluster.session()
        await cluster.ask(messages.FinishSession(TENANT, session, "done"))
        await ended_and_forgotten()
        assert in_memory(cluster) == 0
        await cluster.router_ask(messages.MoveSession(TENANT, session, "project"))
        view: messages.SessionView = await cluster.ask(messages.GetSession(TENANT, session))
        assert view.row.project_id == "project"
        cluster.check_journal()


# -- all that a worker holds ------------------------------------------------------------------------

# The last commit, and what was used last, so much and no more.
BOUNDED = {(Journal, "_committed"), (Present, "_recent"), (BodyStore, "_recent")}


@pytest.mark.parametrize("count", [0, 2])
async def test_nothing_in_a_worker_names_a_session_that_has_come_and_gone(
    autojump_clock: MockClock, tmp_path: Path, count: int
) -> None:
    vllm = servers(count)
    async with Cluster.running(
        tmp_path, vllm=vllm, keep_adapters_hours=1.0, snapshot_seconds=0.05
    ) as cluster:
        if vllm:
            await up(cluster, count)
        left = await Left.by_a_client(cluster)
        assert cluster.router is not None
        assert any("lanes" in path for path in holders(left.session)), "they are found at all"
        await ended_and_forgotten()
        assert holders(left.session) == []


def holders(words: str) -> list[str]:
    """Where something that has these words in it is held, by any task of a worker."""
    found: list[str] = []
    seen: set[int] = set()
    waiting = [(type(actor).__name__, actor) for actor in actors()]
    while waiting:
        path, held = waiting.pop()
        if isinstance(held, str | bytes):
            if (words if isinstance(held, str) else words.encode()) in held:
                found.append(path)
        elif id(held) not in seen:
            seen.add(id(held))
            waiting += [(f"{path}.{name}", part) for name, part in parts(held)]
    return found


def actors() -> Iterator[object]:
    """Whose methods run in some task."""
    tasks = [trio.lowlevel.current_root_task()]
    for task in tasks:
        assert task is not None
        tasks += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
        coroutine: Any = task.coro
        while inspect.iscoroutine(coroutine) and coroutine.cr_frame is not None:
            actor = coroutine.cr_frame.f_locals.get("self")
            if type(actor).__module__.startswith(("tink.actors", "tink.journal")):
                yield actor
            coroutine = coroutine.cr_await


def parts(held: object) -> Iterator[tuple[str, object]]:
    if isinstance(held, dict):
        for key, value in held.items():
            yield "key", key
            yield str(key)[:40], value
    elif isinstance(held, list | tuple | set | frozenset):
        yield from ((str(index), part) for index, part in enumerate(held))
    elif isinstance(held, partial):
        yield "function", held.func
        yield "arguments", [*held.args, *held.keywords.values()]
    elif isinstance(held, types.MethodType):
        yield "self", held.__self__
    elif type(held).__module__.startswith("tink.") and not isinstance(held, type):
        names = [*getattr(held, "__dict__", {}), *getattr(held, "__struct_fields__", ())]
        for name in names:
            if not any(isinstance(held, kind) and name == bounded for kind, bounded in BOUNDED):
                yield name, getattr(held, name)
