"""Random programs under random faults, and what must come out of them.

A seed gives a program (several models of one or two tenants, each a list of operations, with samplers,
saves and loads among them), faults and every delay. The same program is run undisturbed first. Then every
result must be the same, nothing may have diverged, everything must end; and after each step the
invariants of docs/simulation.md must hold.

    python -m tests.simulation.chaos --seeds 200 [--start N] [--jobs N] [--mutant NAME]
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sqlite3
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args
from unittest.mock import patch

import structlog
import trio
from trio.testing import MockClock

from tests.simulation import mutants
from tests.simulation.cluster import Cluster, Meets
from tests.simulation.faults import Mishap, Steps, What, mend, strike, trouble
from tests.simulation.program import TENANTS, Client, Gained, Program, program
from tests.vllm.double import VllmDouble
from tink.actors import pool
from tink.actors.vllm import VLLMActor
from tink.journal import bodies
from tink.limits import SHORT_BODY

# After the last fault everything must end within this: virtual seconds.
LIVENESS_SECONDS = 3600.0
# Until the worker has looked at all servers, and mended what it has found.
QUIET_SECONDS = 150.0
# A program's bodies are a few hundred bytes: for one seed all are short, for another none is, or some.
SHORT_BODIES = (SHORT_BODY, -1, 100)
# In memory, if the machine has such a folder: what survives a power cut is simulated, not tried.
SCRATCH = next((folder for folder in ("/dev/shm",) if Path(folder).is_dir()), None)


class Result(NamedTuple):
    """`steps`: of all tasks, from when the worker serves."""

    gained: list[list[Gained]]
    trace: str
    diverged: int
    counts: Counter[str]
    steps: int


class Verdict(NamedTuple):
    """`wrong`: what is, or None."""

    wrong: str | None
    counts: Counter[str]


async def run(folder: Path, seed: int, what: Program, steps: Steps, disturbed: bool) -> Result:
    """Runs the program in a fresh cluster."""
    gained: list[list[Gained]] = [[] for _ in what.models]
    # No job is deadly here: whatever kills the trainer, it must not be counted against one.
    options = {"snapshot_seconds": what.snapshot_seconds, "retention_hours": what.retention_hours}
    options |= {"max_attempts": 100, "slow": what.slow, "jump": what.jump}
    if disturbed:
        options |= {"loss": what.loss, "duplicates": what.duplicates}
    vllm = [VllmDouble(max_loras=2, max_cpu_loras=2, token_seconds=0.02) for _ in range(what.servers)]
    async with Cluster.running(folder, seed, vllm=vllm, **options) as cluster:
        for server in vllm:
            server.watch = cluster.watch
        first = steps.count
        with trio.CancelScope() as alive:
            async with trio.open_nursery() as nursery:
                if disturbed:
                    nursery.start_soon(_faults, cluster, vllm, what, steps, alive)
                sessions = {tenant: await cluster.session(tenant) for tenant in TENANTS}
                for number, model in enumerate(what.models):
                    client = Client(cluster, sessions[model.tenant], number, model)
                    nursery.start_soon(client.run, gained[number])
        assert not alive.cancelled_caught, f"O8: not ended within {LIVENESS_SECONDS:.0f} s"
        if vllm:
            await cluster.start_worker()
            await trio.sleep(QUIET_SECONDS)
            _check_placements(cluster)
        count = steps.count - first
        cluster.check_journal()
        with closing(sqlite3.connect(cluster.home.journal)) as journal:
            trace = hashlib.sha256()
            for row in journal.execute("SELECT seq, at, kind, job_id, data FROM events ORDER BY seq"):
                trace.update(repr(row).encode())
            diverged = journal.execute("SELECT count(*) FROM events WHERE kind = 'diverged'").fetchone()[0]
    return Result(gained, trace.hexdigest(), diverged, cluster.nature.counts, count)


def _check_placements(cluster: Cluster) -> None:
    """In the end the journal and the servers say the same, and what these have is there."""
    told = {(row.adapter_id, row.replica) for row in cluster.watch.placements() if row.state == "loaded"}
    for url, server in cluster.vllm.items():
        assert isinstance(server, VllmDouble)
        has = {(name.rpartition("/")[2].rpartition("-")[0], url) for name in server.adapters}
        assert has == {pair for pair in told if pair[1] == url}, f"L3: {url} has {has}, journaled is {told}"
        for _, path in server.adapters.values():
            assert Path(path).is_dir(), f"L6: {url} has {path}, which was deleted"


async def _faults(
    cluster: Cluster, vllm: list[VllmDouble], what: Program, steps: Steps, alive: trio.CancelScope
) -> None:
    async with trio.open_nursery() as nursery:
        for server in vllm:
            nursery.start_soon(trouble, cluster.nature, server)
        await strike(cluster, what.faults, steps)
        nursery.cancel_scope.cancel()
    for server in vllm:
        mend(server)
    alive.deadline = trio.current_time() + LIVENESS_SECONDS


def simulate(folder: Path, seed: int, what: Program, *, disturbed: bool) -> Result:
    """`run`, in a Trio of its own with a seeded scheduler: the same seed gives the same trace."""
    # Trio draws the order of ready tasks from this; there is no public way to seed it.
    trio._core._run._r.seed(seed)  # type: ignore[attr-defined]
    steps = Steps()
    with trio_determinism():
        result: Result = trio.run(
            run,
            folder,
            seed,
            what,
            steps,
            disturbed,
            clock=MockClock(autojump_threshold=0),
            instruments=[steps],
        )
    return result


@contextmanager
def trio_determinism() -> Iterator[None]:
    """Makes Trio schedule ready tasks in the seeded order, and restores it."""
    core = trio._core._run  # type: ignore[attr-defined]
    before, core._ALLOW_DETERMINISTIC_SCHEDULING = core._ALLOW_DETERMINISTIC_SCHEDULING, True
    try:
        yield
    finally:
        core._ALLOW_DETERMINISTIC_SCHEDULING = before


def check(seed: int, mutant: str | None = None) -> str | None:
    """Runs a seed; what is wrong with it, or None."""
    return verdict_of(seed, mutant).wrong


def verdict_of(seed: int, mutant: str | None = None) -> Verdict:
    return judge(seed, program(seed), mutant)


def judge(seed: int, what: Program, mutant: str | None = None) -> Verdict:
    """Runs a program twice, and compares."""
    quiet()
    registered = partial(VLLMActor, registered=what.registered)
    short = SHORT_BODIES[seed % len(SHORT_BODIES)]
    # A mutant that cannot be applied is an error here: it would pass for one that was noticed.
    with (
        patch.object(pool, "VLLMActor", registered),
        patch.object(bodies, "SHORT_BODY", short),
        mutants.applied(mutant),
    ):
        try:
            with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
                calm = simulate(Path(folder) / "calm", seed, what, disturbed=False)
                stormy = simulate(Path(folder) / "stormy", seed, what, disturbed=True)
        except (Exception, BaseExceptionGroup) as error:
            return Verdict(f"{type(error).__name__}: {innermost(error)}", Counter())
    return Verdict(difference(calm, stormy), stormy.counts)


def quiet() -> None:
    """Tink logs nothing, in this process."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


def difference(calm: Result, stormy: Result) -> str | None:
    if stormy.diverged:
        return f"{stormy.diverged} diverged events"
    for mine, theirs in zip(stormy.gained, calm.gained, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            if one.differs(other):
                return f"{one} is not {other}"
    return None


def innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def main() -> int:
    parser = argparse.ArgumentParser(description="Simulates the worker under faults, seed by seed.")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--mutant", choices=sorted(mutants.ALL), help="with this taken out of Tink")
    options = parser.parse_args()
    seeds = range(options.start, options.start + options.seeds)
    failed, counts = 0, Counter[str]()
    with ProcessPoolExecutor(options.jobs) as pool:
        verdicts = pool.map(partial(verdict_of, mutant=options.mutant), seeds, chunksize=4)
        for seed, verdict in zip(seeds, verdicts, strict=True):
            counts += verdict.counts
            if verdict.wrong is not None:
                failed += 1
                print(f"seed {seed}: {verdict.wrong[:500]}", flush=True)
    for name, row in reached(counts).items():
        print(f"{name}: " + ", ".join(f"{what} {count}" for what, count in row.items()))
    print(f"seeds={options.seeds} failed={failed}")
    return 1 if failed else 0


def reached(counts: Counter[str]) -> dict[str, dict[str, int]]:
    """What the programs have met, and how often."""
    struck = {
        occasion: sum(counts[f"{what} during {occasion}"] for what in get_args(What))
        for occasion in ("redo", "restore", "snapshot", "op", "sample", "ahead", "commit", "boot")
    }
    return {
        "faults": {what: counts[what] for what in get_args(What)},
        "vLLM servers": {what: counts[f"vllm {what}"] for what in get_args(Mishap)},
        "commits that met": {what: counts[f"commits that met: {what}"] for what in get_args(Meets)},
        "kills and cuts during": struck,
        "of them during a redo": {
            what: counts[f"{what} during redo"] + counts[f"{what} during restore"]
            for what in ("worker", "trainer", "both", "power")
        },
        "of them during a snapshot": {
            what: counts[f"{what} during snapshot"] for what in ("worker", "trainer", "both", "power")
        },
        "seen": {
            what: counts[what]
            for what in (
                "snapshots damaged",
                "snapshots restored",
                "fallbacks",
                "operations redone",
                "long polls",
                "requests come twice",
                "operations ahead",
            )
        },
    }


if __name__ == "__main__":
    sys.exit(main())
