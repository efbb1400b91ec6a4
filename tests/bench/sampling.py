"""Sampling through Tink against straight to the same vLLM servers: tokens a second and how long a request
takes, 64 requests of 8 samples at once. Real vLLM on the CPU, a real `tink serve`, one client, which speaks
HTTP to both; in turn, the best round of each. The baseline is straight to vLLM, its servers in turn.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import httpx
import trio

from tests.bench.figures import Figure
from tests.live import LiveServer
from tests.vllm.fixtures import find_python
from tests.vllm.server import VllmReplica
from tink.trainer import tiny

SUMMARY = "tokens a second through Tink, against straight to vLLM"
PROMPT = list(range(10, 42))
# As many as the worker holds a poll.
POLL_SECONDS = 60.0

_seeds = count(1000, 1000)


class Round(NamedTuple):
    """`speed`: tokens a second. `p50`: seconds of a request."""

    speed: float
    p50: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--at-once", type=int, default=64, help="requests in flight (64)")
    parser.add_argument("--requests", type=int, default=128, help="requests of a round (128)")
    parser.add_argument("--samples", type=int, default=8, help="samples of a request (8)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a sample (32)")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of each; the best one counts (4)")
    parser.add_argument("--replicas", type=int, default=1, help="vLLM servers (1)")


def run(arguments: argparse.Namespace) -> Iterator[Figure]:
    python = find_python()
    with tempfile.TemporaryDirectory(prefix="tink-bench-") as folder:
        home = Path(folder) / "home"
        home.mkdir()
        model = tiny.ensure(home)
        servers = [
            VllmReplica(
                python,
                model,
                Path(folder) / f"vllm-{number}.log",
                ["--served-model-name", tiny.NAME, "--num-gpu-blocks-override", "2048"],
            )
            for number in range(arguments.replicas)
        ]
        try:
            for server in servers:
                server.start(wait=False)
            for server in servers:
                server.wait()
            yield from _compare(arguments, home, servers)
        finally:
            for server in servers:
                server.close()


def _compare(arguments: argparse.Namespace, home: Path, servers: list[VllmReplica]) -> Iterator[Figure]:
    urls = [server.url for server in servers]
    tink = LiveServer(home, USE_HF="false", USE_VLLM="true", VLLM_BASE_URL=",".join(urls))
    tink.start()
    try:
        through, straight = [], []
        for _ in range(arguments.rounds):
            straight.append(trio.run(_straight, urls, arguments))
            through.append(trio.run(_through, tink.url, arguments))
        speed, base = (max(one.speed for one in some) for some in (through, straight))
        yield Figure("tokens_per_second", speed, "tokens/s", base)
        p50, base = (min(one.p50 for one in some) for some in (through, straight))
        yield Figure("request_p50", p50, "s", base)
    finally:
        tink.close()


async def _straight(urls: list[str], arguments: argparse.Namespace) -> Round:
    async with _client() as client:

        async def ask(number: int) -> None:
            body = {
                "model": tiny.NAME,
                "prompt": PROMPT,
                "n": arguments.samples,
                "max_tokens": arguments.tokens,
                "seed": next(_seeds),
                "temperature": 1.0,
                "logprobs": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            answer = await client.post(f"{urls[number % len(urls)]}/v1/completions", json=body)
            answer.raise_for_status()

        return await _timed(ask, arguments)


async def _through(url: str, arguments: argparse.Namespace) -> Round:
    async with _client() as client:

        async def post(path: str, body: dict[str, Any]) -> Any:
            answer = await client.post(f"{url}/api/v1/{path}", json=body)
            answer.raise_for_status()
            return answer

        session = (await post("create_session", {"tags": [], "sdk_version": "bench"})).json()["session_id"]
        sampler = (
            await post(
                "create_sampling_session",
                {"session_id": session, "sampling_session_seq_id": 0, "base_model": tiny.NAME},
            )
        ).json()["sampling_session_id"]

        async def ask(number: int) -> None:
            body = {
                "sampling_session_id": sampler,
                "seq_id": number,
                "num_samples": arguments.samples,
                "prompt": {"chunks": [{"type": "encoded_text", "tokens": PROMPT}]},
                "sampling_params": {"max_tokens": arguments.tokens, "seed": next(_seeds), "stop": []},
            }
            promise = (await post("asample", body)).json()["request_id"]
            while True:
                answer = await client.post(f"{url}/api/v1/retrieve_future", json={"request_id": promise})
                if answer.status_code != 408:
                    answer.raise_for_status()
                    return

        return await _timed(ask, arguments)


def _client() -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=256, max_keepalive_connections=256)
    return httpx.AsyncClient(limits=limits, timeout=POLL_SECONDS, trust_env=False)


async def _timed(ask: Callable[[int], Awaitable[None]], arguments: argparse.Namespace) -> Round:
    """The requests, so many at once."""
    seconds: list[float] = []
    numbers = iter(range(1, 1 + arguments.requests))

    async def user() -> None:
        for number in numbers:
            began = time.perf_counter()
            await ask(number)
            seconds.append(time.perf_counter() - began)

    began = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(arguments.at_once):
            nursery.start_soon(user)
    tokens = arguments.requests * arguments.samples * arguments.tokens
    return Round(tokens / (time.perf_counter() - began), median(seconds))
