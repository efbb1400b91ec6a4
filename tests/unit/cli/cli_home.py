"""A home with a small journal, written by the real writer, and a world in which it is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import trio
from sqlalchemy import text

from tests.unit.journal.journal_kit import written
from tink.domain.events import (
    AdapterExported,
    AnyEvent,
    JobAccepted,
    JobDone,
    JobFailed,
    JobStarted,
    ModelCreated,
    SamplerCreated,
    SessionCreated,
    Subject,
)
from tink.home import Home
from tink.journal.journal import Journal
from tink.world import World

BEGAN = 1_700_000_000.0
SESSION = "5e55" * 8
MODEL = f"{SESSION}:train:0"
SAMPLER = f"{SESSION}:sample:0"
MADE, TRAINED, REFUSED, WAITING, SAMPLED = (
    f"{MODEL}:0",
    f"{MODEL}:1",
    f"{MODEL}:2",
    f"{MODEL}:3",
    f"{SAMPLER}:0",
)
REQUEST, RESULT = b"a request", b"a result"
SECRET = "what the user typed"  # a word of a prompt: no command may print it


class Crash(Exception):
    """Ends a worker without its last event."""


class StillWorld(World):
    """Its clock moves when it is told to; its network is `answer`, or nobody."""

    time = BEGAN
    answer: Callable[[httpx.Request], httpx.Response] | None = None

    def now(self) -> float:
        return StillWorld.time

    def new_id(self) -> str:
        return "b007" * 8

    def http_transport(self, origin: str, max_slots: int) -> httpx.AsyncBaseTransport:
        def refuse(request: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError("refused")

        return httpx.MockTransport(StillWorld.answer or refuse)


def write(home: Home, *, crash: bool = False) -> None:
    """One worker's life: a model, a trained and a refused job, one that waits, and one that runs."""
    home.make()
    world = StillWorld()

    async def live() -> None:
        async with Journal.open(home, world, version="0.1.0", settings_digest="d1ge57") as journal:
            await _events(journal)
            if crash:
                raise Crash
            StillWorld.time = BEGAN + 100

    StillWorld.time = BEGAN
    try:
        trio.run(live)
    except* Crash:
        pass
    StillWorld.time = BEGAN + 200


def journaled(home: Home, job_id: str, event: AnyEvent) -> None:
    """Another worker's life, in which this happened."""

    async def live() -> None:
        async with Journal.open(home, StillWorld(), version="0.1.0", settings_digest="d1ge57") as journal:
            await journal.append((_about(job_id), event))

    trio.run(live)


async def _events(journal: Journal) -> None:
    body, result = await journal.bodies.put(REQUEST), await journal.bodies.put(RESULT)
    await journal.append((_about(), SessionCreated(tags=["demo"], sdk_version="0.38.0")))
    await journal.append(
        (_about(MADE), JobAccepted(op="create_model", seq_id=0, model_seq_id=0, request="{}"))
    )
    await journal.append((_about(MADE), JobStarted(attempt=1, backend="trainer", op_no=1, seq_id=0)))
    shape = {
        "rank": 8,
        "alpha": 32.0,
        "seed": 7,
        "train_attn": True,
        "train_mlp": True,
        "train_unembed": True,
    }
    await journal.append(
        (_about(MADE), JobDone(result={"model_id": MODEL})),
        (_about(MADE), ModelCreated(base_model="tink/qwen3-tiny", **shape)),
    )
    StillWorld.time = BEGAN + 10
    accepted = JobAccepted(op="forward_backward", seq_id=1, body_sha256=body, body_bytes=len(REQUEST))
    await journal.append((_about(TRAINED), accepted))
    StillWorld.time = BEGAN + 12
    await journal.append(
        (_about(TRAINED), JobStarted(attempt=1, backend="trainer", op_no=2, seq_id=1, queue_ms=2000.0))
    )
    StillWorld.time = BEGAN + 15
    done = JobDone(
        result_sha256=result,
        result_bytes=len(RESULT),
        tokens_in=1234,
        loss_sum=2.5,
        run_ms=2900.0,
        idle_ms=40.0,
    )
    await journal.append((_about(TRAINED), done))
    StillWorld.time = BEGAN + 20
    await journal.append((_about(REFUSED), JobAccepted(op="optim_step", seq_id=2, request="{}")))
    failed = JobFailed(category="user", error="learning_rate cannot be\nnegative [bold]", seq_id=2)
    await journal.append((_about(REFUSED), failed))
    StillWorld.time = BEGAN + 30
    await journal.append((_about(WAITING), JobAccepted(op="optim_step", seq_id=3, request="{}")))
    exported = Subject(tenant="default", session_id=SESSION, model_id=MODEL, job_id="j", adapter_id="a")
    await journal.append((exported, AdapterExported(version=1, directory="d", size_bytes=1500, files={})))
    sampler = SamplerCreated(sampler_id=SAMPLER, sampling_seq_id=0, base_model="tink/qwen3-tiny")
    await journal.append((Subject(tenant="default", session_id=SESSION), sampler))
    prompt = await journal.bodies.put(SECRET.encode())
    subject = Subject(tenant="default", session_id=SESSION, job_id=SAMPLED)
    asked = JobAccepted(
        op="sample", seq_id=0, sampler_id=SAMPLER, body_sha256=prompt, seed=1, num_samples=1
    )
    await journal.append((subject, asked))
    await journal.append((subject, JobStarted(attempt=1, backend="trainer")))


def _about(job_id: str | None = None) -> Subject:
    model_id = None if job_id is None else MODEL
    return Subject(tenant="default", session_id=SESSION, model_id=model_id, job_id=job_id)


def alter(home: Home, statement: str) -> None:
    """What a curious hand does to the journal."""
    with written(home) as connection, connection.begin():
        connection.execute(text(statement))


def files(folder: Path) -> dict[str, bytes]:
    """Every file with its content; SQLite's own shared memory, which readers use too, left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(("-shm", "-wal"))
    }
