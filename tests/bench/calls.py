"""What a sampling call costs the worker, by how many are in flight: the CPU time of this process for each
call of the client of vLLM, answers decoded, to a server in another process that only waits. The baseline is
ten in flight: a pool that looks through all connections for every call would cost a hundred times more at a
thousand.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from tests.bench import echo
from tests.bench.figures import Figure
from tink.backends.replica import ReplicaGone
from tink.backends.vllm import VllmClient
from tink.wire.tink_train import SampleRequest
from tink.world import World

SUMMARY = "the CPU time of a sampling call, with few and with many in flight"
FEW = 10
REQUEST = SampleRequest("any", list(range(64)), 0, max_tokens=echo.TOKENS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--in-flight", type=int, default=1000, help="calls at once (1000)")
    parser.add_argument("--calls", type=int, default=5000, help="calls of each round (5000)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each; the best one counts (3)")


def run(arguments: argparse.Namespace) -> Iterator[Figure]:
    few, many = [], []
    # In turn: the machine may get slower or faster meanwhile.
    for _ in range(arguments.rounds):
        few.append(trio.run(measure, FEW, arguments.calls))
        many.append(trio.run(measure, arguments.in_flight, arguments.calls))
    yield Figure("call_cpu", min(many) * 1e6, "us", min(few) * 1e6)


async def measure(in_flight: int, calls: int) -> float:
    """CPU seconds of this process for each call."""
    # As long as it takes to send as many.
    with serving(in_flight * 0.001) as url:
        async with VllmClient.connect(url, World(), slots=in_flight) as client:
            await _warm(client)
            left = calls

            async def caller() -> None:
                nonlocal left
                while left > 0:
                    left -= 1
                    await client.sample(REQUEST, model=echo.MODEL, max_context=1024)

            async with trio.open_nursery() as nursery:  # connections are made
                for _ in range(in_flight):
                    nursery.start_soon(_one, client)
            began = time.process_time()
            async with trio.open_nursery() as nursery:
                for _ in range(in_flight):
                    nursery.start_soon(caller)
            return (time.process_time() - began) / calls


async def _one(client: VllmClient) -> None:
    await client.sample(REQUEST, model=echo.MODEL, max_context=1024)


async def _warm(client: VllmClient) -> None:
    """Returns once the server answers."""
    with trio.fail_after(60):
        while True:
            try:
                return await _one(client)
            except ReplicaGone:
                await trio.sleep(0.1)


@contextmanager
def serving(seconds: float) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "tests.bench.echo", str(port), str(seconds)])
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()
