"""Sampling through Tink against straight to the same vLLM servers: tokens a second and how long a request
takes, 64 requests of 8 samples at once, of the base model or of adapters in turn, each with a prompt of its
own. Real vLLM on the CPU, a real `tink serve`, one client, which speaks HTTP to both; in turn, the median
round of each. The baseline is straight to vLLM, its servers in turn.

Each server has a core to itself where the machine has more cores than it has servers; else what the worker
takes, it takes from them. Its CPU time for each request is measured too. With `--adapters` a real trainer
makes them, through Tink, and stays there beside the rest.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import httpx
import tinker
import trio

from tests.bench.figures import Figure
from tests.bench.servers import vllm_servers
from tests.live import LiveServer
from tests.processes import cpu_seconds
from tink.pretrained import BUILT_IN
from tink.transport import SlotTransport

SUMMARY = "tokens a second through Tink, against straight to vLLM"
# As many as the worker holds a poll.
POLL_SECONDS = 60.0

_seeds = count(1000, 1000)


class Round(NamedTuple):
    """`speed`: tokens a second. `p50`: seconds of a request."""

    speed: float
    p50: float


class Weights(NamedTuple):
    """What is sampled: its name at vLLM, and for Tink."""

    served: str
    path: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--at-once", type=int, default=64, help="requests in flight (64)")
    parser.add_argument("--requests", type=int, default=128, help="requests of a round (128)")
    parser.add_argument("--samples", type=int, default=8, help="samples of a request (8)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt (32)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a sample (32)")
    parser.add_argument("--rounds", type=int, default=8, help="rounds of each; the median counts (8)")
    parser.add_argument("--replicas", type=int, default=1, help="vLLM servers (1)")
    parser.add_argument("--adapters", type=int, default=0, help="adapters; 0 is the base model (0)")


def run(arguments: argparse.Namespace) -> Iterator[Figure]:
    with (
        tempfile.TemporaryDirectory(prefix="tink-bench-") as name,
        vllm_servers(Path(name), arguments.replicas, "--num-gpu-blocks-override", "2048") as urls,
    ):
        tink = LiveServer(
            Path(name) / "home",
            USE_HF="true" if arguments.adapters else "false",
            USE_VLLM="true",
            VLLM_BASE_URL=",".join(urls),
        )
        tink.start()
        try:
            assert tink.process is not None
            yield from _compare(arguments, tink.url, tink.process.pid, urls)
        finally:
            tink.close()


def _compare(arguments: argparse.Namespace, tink: str, pid: int, urls: list[str]) -> Iterator[Figure]:
    _wait_for(tink)
    weights = _adapters(tink, urls, arguments.adapters) or [Weights(BUILT_IN)]
    tinks, vllms, cpu = [], [], 0.0
    for _ in range(arguments.rounds):
        vllms.append(trio.run(straight, urls, weights, arguments))
        before = cpu_seconds(pid)
        tinks.append(trio.run(through, tink, weights, arguments))
        cpu += cpu_seconds(pid) - before
    speed, base = (median(one.speed for one in some) for some in (tinks, vllms))
    yield Figure("tokens_per_second", speed, "tokens/s", base)
    p50, base = (median(one.p50 for one in some) for some in (tinks, vllms))
    yield Figure("request_p50", p50, "s", base)
    yield Figure("worker_cpu", cpu / arguments.rounds / arguments.requests * 1000, "ms/request")


def _wait_for(tink: str) -> None:
    """Until the worker has found all servers."""
    while set(httpx.get(f"{tink}/healthz").json()["servers"].values()) != {"ready"}:
        time.sleep(0.1)


def _adapters(tink: str, urls: list[str], wanted: int) -> list[Weights]:
    """Of as many models. All servers have them."""
    found = []
    service = tinker.ServiceClient(base_url=tink, api_key="tml-local")
    for seed in range(wanted):
        client = service.create_lora_training_client(BUILT_IN, rank=8, seed=seed).result()
        path = client.save_weights_for_sampler("bench").result().path
        found.append(Weights(served_name(urls, f"/{client.model_id}@1-"), path))
    return found


def served_name(urls: list[str], part: str) -> str:
    """The adapter with that in its name, which all servers have."""
    names = [
        {model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"] if part in model["id"]}
        for url in urls
    ]
    (name,) = set.intersection(*names)
    return str(name)


async def straight(urls: list[str], weights: list[Weights], arguments: argparse.Namespace) -> Round:
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(_client(url, arguments.at_once)) for url in urls]

        async def ask(number: int) -> None:
            # Every server gets requests for every adapter.
            turn, place = divmod(number, len(urls))
            seed = next(_seeds)
            body = {
                "model": weights[turn % len(weights)].served,
                "prompt": _prompt(seed, arguments.prompt),
                "n": arguments.samples,
                "max_tokens": arguments.tokens,
                "seed": seed,
                "temperature": 1.0,
                "logprobs": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            answer = await clients[place].post("/v1/completions", json=body)
            answer.raise_for_status()

        return await _timed(ask, arguments)


async def through(url: str, weights: list[Weights], arguments: argparse.Namespace) -> Round:
    async with _client(url, arguments.at_once) as client:

        async def post(path: str, body: dict[str, Any]) -> Any:
            answer = await client.post(f"/api/v1/{path}", json=body)
            answer.raise_for_status()
            return answer

        session = (await post("create_session", {"tags": [], "sdk_version": "bench"})).json()["session_id"]
        samplers = []
        for number, one in enumerate(weights):
            body = {"session_id": session, "sampling_session_seq_id": number}
            body |= {"base_model": one.served} if one.path is None else {"model_path": one.path}
            created = await post("create_sampling_session", body)
            samplers.append(created.json()["sampling_session_id"])

        async def ask(number: int) -> None:
            seed = next(_seeds)
            body = {
                "sampling_session_id": samplers[number % len(samplers)],
                "seq_id": number,
                "num_samples": arguments.samples,
                "prompt": {"chunks": [{"type": "encoded_text", "tokens": _prompt(seed, arguments.prompt)}]},
                "sampling_params": {"max_tokens": arguments.tokens, "seed": seed, "stop": []},
            }
            promise = (await post("asample", body)).json()["request_id"]
            while True:
                poll = {"request_id": promise, "allow_metadata_only": False}
                answer = await client.post("/api/v1/retrieve_future", json=poll)
                if answer.status_code != 408:
                    answer.raise_for_status()
                    return

        return await _timed(ask, arguments)


def _prompt(seed: int, tokens: int) -> list[int]:
    return random.Random(seed).choices(range(10, 1000), k=tokens)


def _client(url: str, at_once: int) -> httpx.AsyncClient:
    """One that costs as little as can be: it shares the machine with what is measured."""
    return httpx.AsyncClient(
        base_url=url, transport=SlotTransport(url, at_once), timeout=POLL_SECONDS, trust_env=False
    )


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
