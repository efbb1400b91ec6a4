"""Many samples at once, of a vLLM server that computes nothing: what is left is Tink's part of a sample.

Clients in processes of their own have 1, 64, 512 and 1,000 requests in flight, in plain HTTP, each up to
its result: samples a second, how long one takes, and the CPU time of the worker for each. Then the
unmodified SDK has 512 at once. The baseline is the same clients, and the SDK, against a server that answers
at once."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import tinker

from tests.bench.figures import Figure, percentile
from tests.bench.load import Load, Report
from tests.bench.rig import Worker, asked, instant, worker
from tests.null_servers import MODEL

SUMMARY = "many samples at once: Tink's part of them"
IN_FLIGHT = (1, 64, 512, 1000)
# Clients are in so many processes, if they have as many in flight.
PROCESSES = 2

_numbers = count()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=4000, help="of a round (4000)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each; the median counts (3)")
    parser.add_argument("--sdk", type=int, default=512, help="samples that the SDK has at once (512)")


def run(arguments: argparse.Namespace) -> Iterator[Figure]:
    with (
        tempfile.TemporaryDirectory(prefix="tink-bench-") as name,
        worker(Path(name), vllm=True) as tink,
        instant(Path(name)) as floor,
    ):
        for in_flight in IN_FLIGHT:
            samples = arguments.samples if in_flight > 1 else arguments.samples // 8
            yield from _compared(tink, floor, arguments.rounds, samples, in_flight)
        yield from _sdk(tink, floor, arguments.rounds, arguments.sdk)


def _compared(tink: Worker, floor: int, rounds: int, samples: int, in_flight: int) -> Iterator[Figure]:
    found: list[list[Report]] = []
    bases: list[list[Report]] = []
    cpu = []
    for _ in range(rounds):
        # In turn: the machine may get slower or faster meanwhile.
        bases.append(asked_of(floor, "instant", samples, in_flight))
        chosen, before = sampler(tink), tink.cpu
        found.append(asked_of(tink.port, chosen, samples, in_flight))
        cpu.append((tink.cpu - before) / samples)
    rate, base = (
        median(sum(len(o.seconds) / o.took for o in one) for one in some) for some in (found, bases)
    )
    yield Figure(f"samples_{in_flight}_rate", rate, "samples/s", base)
    for number in (50, 99):
        value, base = (
            median(percentile([s for o in one for s in o.seconds], number) for one in some)
            for some in (found, bases)
        )
        yield Figure(f"samples_{in_flight}_p{number}", value * 1000, "ms", base * 1000)
    yield Figure(f"samples_{in_flight}_cpu", median(cpu) * 1000, "ms/sample")


def asked_of(port: int, sampler_id: str, samples: int, in_flight: int) -> list[Report]:
    processes = min(PROCESSES, in_flight)
    share = samples // processes
    return asked(
        [
            Load(
                port=port,
                what="sample",
                sampler_id=sampler_id,
                connections=in_flight // processes,
                requests=share,
                first=number * share,
            )
            for number in range(processes)
        ]
    )


def sampler(tink: Worker) -> str:
    session = tink.session()
    fields = {"session_id": session, "sampling_session_seq_id": next(_numbers), "base_model": MODEL}
    return str(tink.post("create_sampling_session", **fields)["sampling_session_id"])


def _sdk(tink: Worker, floor: int, rounds: int, at_once: int) -> Iterator[Figure]:
    clients = [_client(port) for port in (tink.port, floor)]
    for client in clients:
        _sample(client, at_once)
    taken = [[_sample(client, at_once) for client in clients] for _ in range(rounds)]
    seconds, base = (median(each) for each in zip(*taken, strict=True))
    yield Figure(f"sdk_{at_once}", seconds, "s", base)


def _client(port: int) -> Any:
    service = tinker.ServiceClient(base_url=f"http://127.0.0.1:{port}", api_key="tml-local")
    return service.create_sampling_client(base_model=MODEL)


def _sample(client: Any, at_once: int) -> float:
    """Seconds, of all of them."""
    prompt = tinker.types.ModelInput.from_ints([7] * 32)
    chosen = tinker.types.SamplingParams(max_tokens=16)
    began = time.perf_counter()
    futures = [client.sample(prompt, 1, chosen) for _ in range(at_once)]
    for future in futures:
        future.result()
    return time.perf_counter() - began
