"""What Tink adds to an operation that does nothing: how long the unmodified SDK waits for optim_step, for
forward_backward, and for both sent as one, one after the other; of a fresh worker, and of one that has done
`--operations` more. The baseline is the SDK against a server that answers at once (tests/bench/instant.py):
its own time. The old worker is compared with another fresh one, too, asked in turn with it.

A real `tink serve`, durable as always, and a training server that computes nothing, each in a process of
its own. In turn, `--each` of one kind and then of the other server. The CPU time of the worker is told for
each operation: a request that submits it, a poll for its result, and the calls to the training server. With
`--url` it is another server that is compared with the SDK's own time.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import tinker

from tests.bench import rig
from tests.bench.figures import Figure, percentile

SUMMARY = "what Tink adds to an operation that does nothing, by the SDK"
TOKENS = 32
# Sent at once, to make a worker old: as a client that is far ahead.
AHEAD = 50


class Waits(NamedTuple):
    """Seconds, of each operation."""

    optim_step: list[float]
    forward_backward: list[float]
    pair: list[float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--each", type=int, default=50, help="operations of a kind in a round (50)")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of each server (4)")
    parser.add_argument("--url", help="of another server, instead of Tink")
    parser.add_argument("--operations", type=int, default=10_000, help="to make a worker old (10000)")


def run(arguments: argparse.Namespace) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory(prefix="tink-bench-") as name, ExitStack() as stack:
        worker = None if arguments.url else stack.enter_context(rig.worker(Path(name)))
        port = stack.enter_context(rig.instant(Path(name)))
        url = arguments.url if worker is None else worker.live.url
        client, instant = connect(url), connect(f"http://127.0.0.1:{port}")
        young = None
        for age in ("fresh", "old"):
            if age == "old":
                work(client, arguments.operations)
                if worker is not None:
                    folder = Path(name) / "young"
                    folder.mkdir()
                    young = connect(stack.enter_context(rig.worker(folder)).live.url)
            for one in filter(None, (instant, client, young)):
                wait(one, arguments.each // 5)  # what is done once
            tink, base, new, cpu = [], [], [], 0.0
            for _ in range(arguments.rounds):
                base.append(wait(instant, arguments.each))
                before = worker.cpu if worker else 0.0
                tink.append(wait(client, arguments.each))
                cpu += (worker.cpu if worker else 0.0) - before
                if young is not None:
                    new.append(wait(young, arguments.each))
            for kind in Waits._fields:
                found, floors, youngs = (
                    [second for waits in some for second in getattr(waits, kind)]
                    for some in (tink, base, new)
                )
                yield Figure(f"{age}_{kind}_p50", median(found) * 1000, "ms", median(floors) * 1000)
                yield Figure(
                    f"{age}_{kind}_p95", percentile(found, 95) * 1000, "ms", percentile(floors, 95) * 1000
                )
                if youngs:
                    yield Figure(f"aged_{kind}_p50", median(found) * 1000, "ms", median(youngs) * 1000)
            if worker is not None:
                operations = arguments.rounds * arguments.each * 4
                yield Figure(f"{age}_cpu", cpu / operations * 1000, "ms/operation")


def connect(url: str) -> Any:
    key = os.environ.get("TINKER_API_KEY", "tml-local")
    rest = tinker.RestClient(base_url=url, api_key=key)
    model = rest.get_server_capabilities().result().supported_models[0].model_name
    service = tinker.ServiceClient(base_url=url, api_key=key)
    return service.create_lora_training_client(model, rank=8, seed=1).result()


def batch() -> list[tinker.types.Datum]:
    tokens = list(range(10, 10 + TOKENS))
    inputs = {"target_tokens": tokens, "weights": [1.0] * TOKENS}
    return [
        tinker.types.Datum(model_input=tinker.types.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)
    ]


def wait(client: Any, each: int) -> Waits:
    data, adam = batch(), tinker.types.AdamParams()

    def pair() -> None:
        first, second = client.forward_backward(data, "cross_entropy"), client.optim_step(adam)
        first.result()
        second.result()

    return Waits(
        _timed(lambda: client.optim_step(adam).result(), each),
        _timed(lambda: client.forward_backward(data, "cross_entropy").result(), each),
        _timed(pair, each),
    )


def _timed(call: Callable[[], object], times: int) -> list[float]:
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return seconds


def work(client: Any, operations: int) -> None:
    data, adam = batch(), tinker.types.AdamParams()
    for _ in range(operations // (2 * AHEAD)):
        sent = []
        for _ in range(AHEAD):
            sent += [client.forward_backward(data, "cross_entropy"), client.optim_step(adam)]
        for future in sent:
            future.result()
