"""The CPU time of what a worker does most, in units of this machine: has anything become dearer?

Each cost is the worker's CPU time for one operation, divided by the CPU time of a fixed piece of work that
is measured before and after it (`unit`), so that another machine, or a busy one, gives about the same. The
baseline is what was recorded (costs.json); with `--check` the exit status is 1 if one is over it by more
than `--margin`. `--record` writes them down."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import msgspec

from tests.bench import accept, journal, samples
from tests.bench.figures import Figure
from tests.bench.load import Load
from tests.bench.rig import Worker, asked, worker

SUMMARY = "the CPU time of what a worker does most, against what was recorded"
RECORDED = Path(__file__).with_suffix(".json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each; the least counts (3)")
    parser.add_argument(
        "--margin", type=float, default=1.0, help="what may be more: 1.0 is twice as much (1.0)"
    )
    parser.add_argument("--check", action="store_true", help="exit status 1 if one is over it")
    parser.add_argument("--record", action="store_true", help="write them down")


def run(arguments: argparse.Namespace) -> Iterator[Figure]:
    recorded: dict[str, float] = json.loads(RECORDED.read_text())
    figures = []
    with tempfile.TemporaryDirectory(prefix="tink-bench-") as name, worker(Path(name), vllm=True) as tink:
        for what, measure in costs(tink).items():
            found = min(in_units(measure) for _ in range(arguments.rounds))
            figures.append(Figure(what, found, "units", recorded.get(what)))
            yield figures[-1]
    if arguments.record:
        RECORDED.write_text(json.dumps({one.name: round(one.value, 3) for one in figures}, indent=4) + "\n")
    dear = [one for one in figures if one.baseline and one.value > one.baseline * (1 + arguments.margin)]
    if arguments.check and dear:
        sys.exit("dearer than it was: " + "; ".join(map(str, dear)))


def costs(tink: Worker) -> dict[str, Callable[[], float]]:
    """CPU seconds of one operation each."""
    return {
        "append": lambda: journal.append(16, 2000).cpu / 1e6,
        "accepted_job": lambda: _of(tink, 1500, lambda: _accept(tink, 1500)),
        "step": lambda: _of(tink, 150, lambda: _steps(tink, 150)),
        "sample": lambda: _of(tink, 600, lambda: _samples(tink, 600)),
    }


def _of(tink: Worker, operations: int, work: Callable[[], object]) -> float:
    before = tink.cpu
    work()
    return (tink.cpu - before) / operations


def _accept(tink: Worker, jobs: int) -> None:
    accept.taken(tink.port, tink.model(tink.session()), jobs, 32)


def _steps(tink: Worker, steps: int) -> None:
    """One after the other, each with its poll."""
    model = tink.model(tink.session())
    load = Load(port=tink.port, what="step", connections=1, requests=steps, model_id=model, first=1)
    asked([load])


def _samples(tink: Worker, count: int) -> None:
    samples.asked_of(tink.port, samples.sampler(tink), count, 64)


def in_units(measure: Callable[[], float]) -> float:
    before = unit()
    found = measure()
    return found / median([before, unit()])


def unit() -> float:
    """CPU seconds of a fixed piece of work: objects, strings, hashes and JSON, about a millisecond."""
    found = []
    for _ in range(30):
        began = time.process_time()
        _work()
        found.append(time.process_time() - began)
    return median(found)


def _work() -> None:
    last = ""
    for number in range(150):
        event = {"kind": "job_done", "job_id": f"job:{number}", "metrics": {"loss:sum": number / 7}}
        packed = msgspec.json.encode(event)
        last = hashlib.sha256(packed + last.encode()).hexdigest()
        assert msgspec.json.decode(packed)["job_id"].rpartition(":")[2] == str(number)
