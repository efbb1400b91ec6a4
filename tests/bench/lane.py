"""How long the training server has nothing to do between two operations, though jobs wait: its own word, as
the journal has it (`idle_ms`). The baseline is the same worker, in which no operation goes ahead of its
turn.

A real worker without its HTTP side; a real training server in another process, over loopback, and in it an
engine that only waits `--op-ms` for each operation. All jobs are there before the first one runs.

Then a client that is one step ahead (forward_backward and optim_step of `--step-ms` each, the next step
sent when the one before the last has ended): the trainer's idle time between two of its operations. And
eight models whose jobs are all there: of the jobs that have ended when half of them have, the least of a
model against the most."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import msgspec
import trio

from tests.bench import still
from tests.bench.figures import Figure, percentile
from tests.processes import serving
from tink.actors.jobs import Jobs
from tink.actors.router import Router
from tink.actors.worker import open_worker
from tink.backends.endpoint import ExternalEndpoint
from tink.domain import ids, messages
from tink.domain.requests import OpName
from tink.home import Home
from tink.journal.journal import Journal
from tink.logs import configure_logs
from tink.settings import Settings
from tink.world import World

SUMMARY = "how long the trainer idles between two jobs, with operations ahead and without"
TENANT = "bench"
# Fairness takes so many times the jobs of a round: the first model's one job ahead counts less then.
FAIR_JOBS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=int, default=12, help="forward_backward jobs of a round (12)")
    parser.add_argument("--op-ms", type=float, default=400.0, help="what each takes in the engine (400)")
    parser.add_argument("--steps", type=int, default=40, help="of the client that is one step ahead (40)")
    parser.add_argument(
        "--step-ms", type=float, default=20.0, help="what each of its operations takes (20)"
    )
    parser.add_argument("--rounds", type=int, default=2, help="rounds of each, in turn (2)")


def run(arguments: argparse.Namespace) -> Iterator[Figure]:
    configure_logs("error")
    for size, name in ((5_000_000, "5MB"), (1_000_000, "1MB"), (10_000, "10kB")):
        for models in (1, 4):
            ahead, after = both(arguments, partial(measure, arguments, size, models))
            name_of_all = f"idle_{name}_{models}_model{'s'[: models > 1]}"
            yield Figure(name_of_all, median(ahead), "ms", median(after))
    ahead, after = both(arguments, partial(one_ahead, arguments))
    yield Figure("idle_one_step_ahead_p50", median(ahead), "ms", median(after))
    yield Figure("idle_one_step_ahead_p95", percentile(ahead, 95), "ms", percentile(after, 95))
    yield Figure("fairness_8_models", median(trio.run(fairness, arguments) for _ in range(3)), "least/most")


def both(
    arguments: argparse.Namespace, idle: Callable[[], Awaitable[list[float]]]
) -> tuple[list[float], list[float]]:
    """With operations ahead, and without. In turn, and each as often first: the machine may get slower or
    faster meanwhile."""
    ahead: list[float] = []
    after: list[float] = []
    for number in range(arguments.rounds):
        for found in (ahead, after) if number % 2 else (after, ahead):
            with ExitStack() as stack:
                if found is after:
                    stack.enter_context(patch.object(Jobs, "coming", lambda self: []))
                found += trio.run(idle)
    return ahead, after


async def measure(arguments: argparse.Namespace, size: int, models: int) -> list[float]:
    """`idle_ms` of each job but the first."""
    with (
        tempfile.TemporaryDirectory(prefix="tink-bench-") as name,
        _server(Path(name), arguments.op_ms / 1000) as url,
    ):
        async with _worker(Path(name) / "home", url) as (journal, router):
            created: messages.Created = await router.ask(messages.CreateSession(TENANT))
            made = [await _create(router, created.id, number) for number in range(models)]
            last = arguments.jobs // models
            # The first ones come last: until then the lanes wait for them.
            order = [(seq, model) for seq in range(last, 0, -1) for model in made]
            promises = [await _submit(router, model, seq, os.urandom(size)) for seq, model in order]
            for job_id in promises:
                await router.ask(messages.AwaitOutcome(TENANT, job_id))
            ended = [await journal.job(job_id) for job_id in promises if not job_id.endswith(":1")]
    assert all(job is not None and job.state == "done" for job in ended)
    return [job.idle_ms for job in ended if job is not None and job.idle_ms is not None]


async def one_ahead(arguments: argparse.Namespace) -> list[float]:
    """`idle_ms` of each operation but those of the first two steps."""
    with (
        tempfile.TemporaryDirectory(prefix="tink-bench-") as name,
        _server(Path(name), arguments.step_ms / 1000) as url,
    ):
        async with _worker(Path(name) / "home", url) as (journal, router):
            created: messages.Created = await router.ask(messages.CreateSession(TENANT))
            model = await _create(router, created.id, 0)
            sent: deque[list[str]] = deque()
            jobs = []
            for step in range(arguments.steps):
                if len(sent) == 2:
                    jobs += (done := sent.popleft())
                    for job_id in done:
                        await router.ask(messages.AwaitOutcome(TENANT, job_id))
                adam = msgspec.json.encode({"model_id": model, "adam_params": {"learning_rate": 1e-4}})
                sent.append(
                    [
                        await _submit(router, model, 2 * step + 1, os.urandom(100_000)),
                        await _submit(router, model, 2 * step + 2, adam, "optim_step"),
                    ]
                )
            ended = [await journal.job(job_id) for job_id in jobs[4:]]
    return [job.idle_ms for job in ended if job is not None and job.idle_ms is not None]


async def fairness(arguments: argparse.Namespace) -> float:
    """Of eight models: jobs of the one that has had least, against the one that has had most."""
    with (
        tempfile.TemporaryDirectory(prefix="tink-bench-") as name,
        _server(Path(name), arguments.step_ms / 1000) as url,
    ):
        async with _worker(Path(name) / "home", url) as (_, router):
            created: messages.Created = await router.ask(messages.CreateSession(TENANT))
            made = [await _create(router, created.id, number) for number in range(8)]
            # The first ones come last: until then the lanes wait for them.
            order = [(seq, model) for seq in range(FAIR_JOBS * arguments.jobs, 0, -1) for model in made]
            promises = [await _submit(router, model, seq, os.urandom(1000)) for seq, model in order]
            ended: Counter[str] = Counter()
            half = trio.Event()

            async def wait(job_id: str) -> None:
                await router.ask(messages.AwaitOutcome(TENANT, job_id))
                if not half.is_set():
                    ended[job_id.rpartition(":")[0]] += 1
                    if ended.total() == len(promises) // 2:
                        half.set()

            async with trio.open_nursery() as nursery:
                for job_id in promises:
                    nursery.start_soon(wait, job_id)
    return min(ended[model] for model in made) / max(ended.values())


async def _create(router: Router, session_id: str, number: int) -> str:
    model_id = ids.model_id(session_id, number)
    body = {"session_id": session_id, "model_seq_id": number, "base_model": still.MODEL}
    config = msgspec.json.encode(body | {"lora_config": {"rank": 8}})
    job_id = await _submit(router, model_id, 0, config, "create_model", number)
    await router.ask(messages.AwaitOutcome(TENANT, job_id))
    return model_id


async def _submit(
    router: Router,
    model_id: str,
    seq: int,
    body: bytes,
    op: OpName = "forward_backward",
    number: Any = None,
) -> str:
    promise: messages.Promise = await router.ask(
        messages.SubmitTraining(
            TENANT,
            op=op,
            session_id=model_id.partition(":")[0],
            model_id=model_id,
            seq_id=seq,
            model_seq_id=number,
            body=body,
        )
    )
    return promise.request_id


@asynccontextmanager
async def _worker(folder: Path, url: str) -> AsyncIterator[tuple[Journal, Router]]:
    settings, world, home = Settings(home=folder, use_megatron=True), World(), Home(folder)
    home.make()
    async with (
        Journal.open(home, world, version="bench", settings_digest="bench") as journal,
        open_worker(journal, ExternalEndpoint(url).find, settings, world) as router,
    ):
        yield journal, router


@contextmanager
def _server(folder: Path, seconds: float) -> Iterator[str]:
    """Its URL."""
    folder = folder / "trainer"
    folder.mkdir()
    with serving("tests.bench.still", folder / "ready.json", str(seconds)) as server:
        yield f"http://127.0.0.1:{json.loads(server.said)['port']}"
