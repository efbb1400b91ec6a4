"""Two thousand clients that wait for a result, and one that does not: what a poll that is held takes of
memory, how long a small request and a heartbeat take meanwhile, and the CPU of nothing but waiting. The
baselines are the same of a worker whom nobody waits for; clients are in processes of their own."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from tests.bench.figures import Figure, percentile
from tests.bench.load import Load
from tests.bench.rig import Worker, asked, clients, worker

SUMMARY = "many clients that wait: their memory, and how long others take meanwhile"
RATE = 100.0
# A poll is held for less than that.
WAIT_SECONDS = 15.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--polls", type=int, default=2000, help="clients that wait (2000)")
    parser.add_argument("--requests", type=int, default=300, help="small requests of each kind (300)")


def run(arguments: argparse.Namespace) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory(prefix="tink-bench-") as name, worker(Path(name)) as tink:
        session = tink.session()
        model = tink.model(session)
        # It waits for number 1.
        job = tink.post("optim_step", model_id=model, seq_id=2, adam_params={})["request_id"]
        alone = small(tink, model, session, arguments.requests, first=3)
        before = tink.memory
        polls = [
            Load(
                port=tink.port,
                what="poll",
                job_id=job,
                connections=arguments.polls // 2,
                requests=arguments.polls // 2,
            )
            for _ in range(2)
        ]
        with clients(polls):
            wait_for(tink, arguments.polls)
            yield Figure("memory", (tink.memory - before) / arguments.polls / 1000, "kB/poll")
            cpu, began = tink.cpu, time.monotonic()
            meanwhile = small(tink, model, session, arguments.requests, first=3 + arguments.requests)
            idle = time.monotonic() - began
            yield Figure("worker_cpu", (tink.cpu - cpu) / idle * 100, "%")
            for what, (found, base) in {k: (meanwhile[k], alone[k]) for k in alone}.items():
                yield Figure(f"{what}_p50", median(found) * 1000, "ms", median(base) * 1000)
                yield Figure(f"{what}_p99", percentile(found, 99) * 1000, "ms", percentile(base, 99) * 1000)
            tink.post("optim_step", model_id=model, seq_id=1, adam_params={})  # they may all go


def small(tink: Worker, model: str, session: str, requests: int, first: int) -> dict[str, list[float]]:
    found = {}
    for what in ("optim_step", "heartbeat"):
        load = Load(
            port=tink.port,
            what=what,
            connections=1,
            requests=requests,
            rate=RATE,
            model_id=model,
            session_id=session,
            first=first,
        )
        (report,) = asked([load])
        found[what] = report.seconds
    return found


def wait_for(tink: Worker, polls: int) -> None:
    """Until so many connections are open, and their requests have been read."""
    deadline = time.monotonic() + WAIT_SECONDS
    while tink.connections < polls and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.0)
