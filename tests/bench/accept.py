"""How many jobs a worker takes a second, each of which is durable when it is answered: plain HTTP by
clients in processes of their own, at 1, 32 and 256 connections. Jobs are taken and not run: the model's
first number is missing, so that its lane waits.

A small job is an optim_step; a large one a forward_backward of 640 kB. The baseline is a server that
answers at once, and keeps nothing. Last, the small jobs of 4 connections, 50 a second, while 20 large ones
come a second: their p99 against that of the same without."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

from tests.bench.figures import Figure, percentile
from tests.bench.load import Load, Report
from tests.bench.rig import Worker, asked, instant, worker

SUMMARY = "jobs that a worker takes a second, and what that costs"
CONNECTIONS = (1, 32, 256)
# Clients are in so many processes, if they have as many connections.
PROCESSES = 2
LARGE = 640_000
SMALL_RATE, LARGE_RATE = 50.0, 20.0


class Taken(NamedTuple):
    """`rate`: jobs a second. `p99`: seconds until the answer. `cpu`: seconds of the worker for each."""

    rate: float
    p99: float
    cpu: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # None of them runs (they wait for the first number), and no more than MAX_OPEN_JOBS are open at once.
    parser.add_argument("--jobs", type=int, default=2500, help="small jobs of a round (2500)")
    parser.add_argument("--large", type=int, default=100, help="large jobs of a round (100)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each; the median counts (3)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the last figure (10)")


def run(arguments: argparse.Namespace) -> Iterator[Figure]:
    with (
        tempfile.TemporaryDirectory(prefix="tink-bench-") as name,
        worker(Path(name)) as tink,
        instant(Path(name)) as floor,
    ):
        for connections in CONNECTIONS:
            jobs = arguments.jobs if connections > 1 else arguments.jobs // 4
            yield from _compared(f"small_{connections}", tink, floor, arguments.rounds, jobs, connections)
        for connections in (1, 8):
            large = arguments.large
            yield from _compared(
                f"large_{connections}", tink, floor, arguments.rounds, large, connections, LARGE
            )
        yield from _beside(tink, arguments.seconds)


def _compared(
    name: str, tink: Worker, floor: int, rounds: int, jobs: int, connections: int, size: int = 0
) -> Iterator[Figure]:
    found, bases = [], []
    for _ in range(rounds):
        # In turn: the machine may get slower or faster meanwhile.
        bases.append(taken(floor, "instant", jobs, connections, size))
        before = tink.cpu
        one = taken(tink.port, tink.model(tink.session()), jobs, connections, size)
        found.append(one._replace(cpu=(tink.cpu - before) / jobs))
    rate, base = (median(one.rate for one in some) for some in (found, bases))
    yield Figure(f"{name}_rate", rate, "jobs/s", base)
    p99, base = (median(one.p99 for one in some) for some in (found, bases))
    yield Figure(f"{name}_p99", p99 * 1000, "ms", base * 1000)
    yield Figure(f"{name}_cpu", median(one.cpu for one in found) * 1e6, "us")


def taken(port: int, model: str, jobs: int, connections: int, size: int = 0) -> Taken:
    processes = min(PROCESSES, connections)
    share = jobs // processes
    loads = [
        _load(port, model, share, connections // processes, size, first=2 + number * share)
        for number in range(processes)
    ]
    reports = asked(loads)
    return Taken(sum(len(one.seconds) / one.took for one in reports), _p99(reports), 0.0)


def _load(
    port: int, model: str, requests: int, connections: int, size: int, *, first: int, rate: float = 0.0
) -> Load:
    return Load(
        port=port,
        what="forward_backward" if size else "optim_step",
        model_id=model,
        requests=requests,
        connections=connections,
        size=size,
        first=first,
        rate=rate,
    )


def _p99(reports: list[Report]) -> float:
    return percentile([second for one in reports for second in one.seconds], 99)


def _beside(tink: Worker, seconds: float) -> Iterator[Figure]:
    """Small jobs while large ones come, against small ones alone."""
    count = int(SMALL_RATE * seconds)

    def small() -> Load:
        return _load(tink.port, tink.model(tink.session()), count, 4, 0, first=2, rate=SMALL_RATE)

    model, large = tink.model(tink.session()), int(LARGE_RATE * seconds)
    alone = asked([small()])
    beside = asked([small(), _load(tink.port, model, large, 4, LARGE, first=2, rate=LARGE_RATE)])
    p50, base = (median(some[0].seconds) for some in (beside, alone))
    yield Figure("small_beside_large_p50", p50 * 1000, "ms", base * 1000)
    p99, base = (_p99(some[:1]) for some in (beside, alone))
    yield Figure("small_beside_large_p99", p99 * 1000, "ms", base * 1000)
    yield Figure("large_beside_small_p50", median(beside[1].seconds) * 1000, "ms")
