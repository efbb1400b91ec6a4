"""Random programs under random faults, and what must come out of them.

A seed gives a program (several models, each a list of operations, with samplers, saves and loads among
them), a schedule of faults (worker, trainer or both killed at random moments, calls and answers lost) and
every delay. The same program is run undisturbed first. Then every result must be the same, every job must
have ended once, the tables must be the fold of the events, and nothing may have diverged.

    python -m tests.simulation.chaos --seeds 200 [--start N] [--jobs N]
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import random
import sqlite3
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import structlog
import trio
from trio.testing import MockClock

from tests.simulation.cluster import TENANT, Cluster
from tink.domain import ids, messages

# After the last fault everything must end within this: virtual seconds.
LIVENESS_SECONDS = 3600.0


class Op(NamedTuple):
    """`kind`: train, step, forward, poison, save, load, sampler, sample. `value`: what makes it differ."""

    kind: str
    value: int


class Program(NamedTuple):
    models: list[list[Op]]
    faults: list[tuple[float, str, float]]
    loss: float
    snapshot_seconds: float


def program(seed: int) -> Program:
    rng = random.Random(f"program {seed}")
    kinds = (
        ["train"] * 8 + ["step"] * 5 + ["forward", "poison", "save", "load", "sampler", "sample", "sample"]
    )
    models = [
        [Op(rng.choice(kinds), rng.randrange(10**6)) for _ in range(rng.randint(4, 18))]
        for _ in range(rng.randint(1, 3))
    ]
    faults = [
        (rng.uniform(0.05, 1.5), rng.choice(["worker", "trainer", "both"]), rng.choice([0.0, 0.2, 3.0]))
        for _ in range(rng.randint(1, 5))
    ]
    return Program(models, faults, rng.choice([0.0, 0.0, 0.05, 0.15]), rng.choice([0.03, 0.2, 30.0]))


class Result(NamedTuple):
    outcomes: list[list[Any]]
    trace: str
    diverged: int


async def run(folder: Path, seed: int, what: Program, *, disturbed: bool) -> Result:
    """Runs the program in a fresh cluster."""
    loss = what.loss if disturbed else 0.0
    outcomes: list[list[Any]] = [[] for _ in what.models]
    # No job is deadly here: whatever kills the trainer, it must not be counted against one.
    settings = {"snapshot_seconds": what.snapshot_seconds, "max_attempts": 100}
    async with Cluster.running(folder, seed, loss=loss, **settings) as cluster:
        with trio.fail_after(LIVENESS_SECONDS):
            async with trio.open_nursery() as nursery:
                if disturbed:
                    nursery.start_soon(_faults, cluster, what.faults)
                session = await cluster.session()
                for number, ops in enumerate(what.models):
                    nursery.start_soon(_client, cluster, session, number, ops, outcomes[number])
        cluster.check_journal()
        with sqlite3.connect(cluster.home.journal) as journal:
            trace = hashlib.sha256()
            for row in journal.execute("SELECT seq, at, kind, job_id, data FROM events ORDER BY seq"):
                trace.update(repr(row).encode())
            diverged = journal.execute("SELECT count(*) FROM events WHERE kind = 'diverged'").fetchone()[0]
    return Result(outcomes, trace.hexdigest(), diverged)


async def _faults(cluster: Cluster, faults: list[tuple[float, str, float]]) -> None:
    for after, victim, pause in faults:
        await trio.sleep(after)
        if victim in ("trainer", "both"):
            cluster.trainer.kill()
        if victim in ("worker", "both"):
            cluster.crash_worker()
        await trio.sleep(pause)
        # Either may come back first.
        starts = [cluster.start_worker] * (victim != "trainer") + [cluster.start_trainer] * (
            victim != "worker"
        )
        cluster.rng.shuffle(starts)
        for start in starts:
            await start()


async def _client(cluster: Cluster, session: str, number: int, ops: list[Op], outcomes: list[Any]) -> None:
    """Submits like the SDK, some of it twice and some of it out of order, and collects what comes back."""
    rng = random.Random(f"client {number} {ops}")
    model = await cluster.create(session, number)
    pending = [f"{model}:0"]
    seq, samplers, held = 1, 0, list[tuple[Any, ...]]()
    for op in ops:
        if op.kind == "sample":
            job = await _sample(cluster, session, number, samplers, op)
            if job is not None:
                pending.append(job)
            continue
        name, body = _request(model, seq, number, samplers, op)
        samplers += op.kind == "sampler"
        held.append((model, seq, name, body))
        pending.append(ids.job_id(model, seq))
        seq += 1
        # Chunks of one call arrive in any order; nothing else overtakes.
        if op.kind != "train" or rng.random() < 0.5:
            rng.shuffle(held)
            for submission in [*held, *(s for s in held if rng.random() < 0.2)]:
                await cluster.submit(*submission)
            held = []
        if op.kind == "sampler":  # the SDK waits for it before it samples
            await cluster.outcome(pending[-1])
    for submission in held:
        await cluster.submit(*submission)
    for job in pending:
        outcome = await cluster.outcome(job)
        # The session's id is drawn anew in each run.
        text = msgspec.json.encode(outcome.result).decode().replace(session, "SESSION")
        error = (outcome.error or "").replace(session, "SESSION")
        outcomes.append((job.replace(session, "SESSION"), outcome.state, outcome.body, text, error))


async def _sample(cluster: Cluster, session: str, number: int, samplers: int, op: Op) -> str | None:
    if not samplers:
        return None
    body = {
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [op.value % 90]}]},
        "sampling_params": {"seed": op.value},
    }
    sampler = ids.sampler_id(session, 1000 * number + op.value % samplers)
    ask = messages.SubmitSample(TENANT, sampler, op.value, msgspec.json.encode(body))
    promise: messages.Promise = await cluster.ask(ask)
    return promise.request_id


def _request(model: str, seq: int, number: int, samplers: int, op: Op) -> tuple[Any, bytes]:
    common: dict[str, Any] = {"model_id": model, "seq_id": seq}
    match op.kind:
        case "train":
            return "forward_backward", f"batch {op.value}".encode()
        case "poison":
            return "forward_backward", b"poison"
        case "forward":
            return "forward", f"batch {op.value}".encode()
        case "step":
            return "optim_step", msgspec.json.encode(
                common | {"adam_params": {"learning_rate": op.value / 10**6}}
            )
        case "save":
            return "save_weights", msgspec.json.encode(common | {"path": "last", "overwrite": True})
        case "load":
            path = f"tinker://{model}/weights/last"
            return "load_weights", msgspec.json.encode(
                common | {"path": path, "optimizer": op.value % 2 == 0}
            )
    sampler = 1000 * number + samplers
    return "save_weights_for_sampler", msgspec.json.encode(common | {"sampling_session_seq_id": sampler})


def check(seed: int) -> str | None:
    """Runs a seed; what is wrong with it, or None."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    what = program(seed)
    try:
        with tempfile.TemporaryDirectory() as folder:
            calm = simulate(Path(folder) / "calm", seed, what, disturbed=False)
            stormy = simulate(Path(folder) / "stormy", seed, what, disturbed=True)
    except (Exception, BaseExceptionGroup) as error:
        return f"{type(error).__name__}: {_innermost(error)}"
    if stormy.diverged:
        return f"{stormy.diverged} diverged events"
    for mine, theirs in zip(stormy.outcomes, calm.outcomes, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            if one != other:
                return f"{one} is not {other}"
    return None


def simulate(folder: Path, seed: int, what: Program, *, disturbed: bool) -> Result:
    """`run`, in a Trio of its own with a seeded scheduler: the same seed gives the same trace."""
    # Trio draws the order of ready tasks from this; there is no public way to seed it.
    trio._core._run._r.seed(seed)  # type: ignore[attr-defined]
    with trio_determinism():
        clock = MockClock(autojump_threshold=0)

        async def main() -> Result:
            return await run(folder, seed, what, disturbed=disturbed)

        result: Result = trio.run(main, clock=clock)
    return result


class trio_determinism:
    """Makes Trio schedule ready tasks in the seeded order, and restores it."""

    def __enter__(self) -> None:
        self._before = trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING  # type: ignore[attr-defined]
        trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[attr-defined]

    def __exit__(self, *_: object) -> None:
        trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING = self._before  # type: ignore[attr-defined]


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def main() -> int:
    parser = argparse.ArgumentParser(description="Simulates the worker under faults, seed by seed.")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    seeds = range(options.start, options.start + options.seeds)
    failed = 0
    with ProcessPoolExecutor(options.jobs) as pool:
        for seed, wrong in zip(seeds, pool.map(check, seeds, chunksize=4), strict=True):
            if wrong is not None:
                failed += 1
                print(f"seed {seed}: {wrong}", flush=True)
    print(f"seeds={options.seeds} failed={failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
