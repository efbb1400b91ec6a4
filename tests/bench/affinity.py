"""What it is worth that a prompt goes where its beginning went: conversations on several vLLM servers, each
turn a prompt that goes on from the one before. The share of prompt tokens that a server found in its prefix
cache, and how long a turn takes; the baseline is the same without affinity. Real vLLM on the CPU, real
workers.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest.mock import patch

import httpx
import msgspec
import trio

from tests.bench.figures import Figure
from tests.vllm.fixtures import find_python
from tests.vllm.server import VllmReplica
from tink.actors import pool
from tink.actors.router import Router
from tink.actors.worker import open_worker
from tink.domain import messages
from tink.journal.home import Home
from tink.journal.journal import Journal
from tink.settings import Settings
from tink.trainer import tiny
from tink.world import World

SUMMARY = "prefix-cache hits with samples kept together, against spread"
TENANT = "default"
# vLLM's cache works in whole blocks of 32 tokens here.
FIRST, MORE, ANSWER = 64, 16, 8
HITS = re.compile(r"^vllm:prefix_cache_(hits|queries)_total\{.*\} (\S+)$", re.MULTILINE)


class Outcome(NamedTuple):
    """`hits`: the share of prompt tokens. `p50`: seconds of a turn."""

    hits: float
    p50: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--conversations", type=int, default=16, help="conversations, all at once (16)")
    parser.add_argument("--turns", type=int, default=8, help="turns of each (8)")
    parser.add_argument("--replicas", type=int, default=2, help="vLLM servers (2)")


def run(arguments: argparse.Namespace) -> Iterator[Figure]:
    python = find_python()
    with tempfile.TemporaryDirectory(prefix="tink-bench-") as name:
        folder = Path(name)
        model = tiny.ensure(folder)
        servers = [
            VllmReplica(python, model, folder / f"vllm-{number}.log")
            for number in range(arguments.replicas)
        ]
        try:
            for server in servers:
                server.start(wait=False)
            for server in servers:
                server.wait()
            urls = [server.url for server in servers]
            with patch.object(pool, "AFFINITY_SLACK", -(10**9)):
                spread = trio.run(measure, folder / "spread", urls, arguments, 1)
            together = trio.run(measure, folder / "together", urls, arguments, 2)
        finally:
            for server in servers:
                server.close()
        yield Figure("prompt_tokens_cached", 100 * together.hits, "%", 100 * spread.hits)
        yield Figure("turn_p50", together.p50, "s", spread.p50)


async def measure(folder: Path, urls: list[str], arguments: argparse.Namespace, salt: int) -> Outcome:
    """`salt`: prompts of another one are not in any cache."""
    home, world = Home(folder), World()
    home.make()
    settings = Settings(home=folder, use_hf="false", use_vllm=True, vllm_base_url=",".join(urls))

    async def nobody(_unfit: str | None) -> None:
        raise AssertionError("nothing is trained here")

    async with (
        Journal.open(home, world, version="bench", settings_digest="bench") as journal,
        open_worker(journal, nobody, settings, world) as router,  # type: ignore[arg-type]
    ):
        capabilities = await router.ask(messages.GetCapabilities(TENANT))
        await _all_ready(router)
        session = (await router.ask(messages.CreateSession(TENANT))).id
        base = capabilities.models[0].name
        sampler = (await router.ask(messages.CreateSampler(TENANT, session, 0, base_model=base))).id
        before, seconds = _counts(urls), list[float]()
        async with trio.open_nursery() as nursery:
            for number in range(arguments.conversations):
                nursery.start_soon(_converse, router, sampler, number, arguments.turns, salt, seconds)
        hits, queries = (after - b for after, b in zip(_counts(urls), before, strict=True))
        return Outcome(hits / queries, median(seconds))


async def _all_ready(router: Router) -> None:
    while True:
        health: messages.Health = await router.ask(messages.GetHealth(""))
        if all(state == "ready" for state in health.servers.values()):
            return
        await trio.sleep(0.1)


async def _converse(
    router: Router, sampler: str, number: int, turns: int, salt: int, seconds: list[float]
) -> None:
    prompt = [1 + (salt * 7919 + number * 104729 + place * 31) % 1000 for place in range(FIRST)]
    for turn in range(turns):
        body = msgspec.json.encode(
            {
                "prompt": {"chunks": [{"type": "encoded_text", "tokens": prompt}]},
                "sampling_params": {"max_tokens": ANSWER, "seed": turn, "stop": []},
            }
        )
        began = time.perf_counter()
        ask = messages.SubmitSample(TENANT, sampler, number * 1000 + turn + 1, body)
        promise: messages.Promise = await router.ask(ask)
        outcome: messages.Outcome = await router.ask(messages.AwaitOutcome(TENANT, promise.request_id))
        assert outcome.state == "done", outcome.error
        seconds.append(time.perf_counter() - began)
        prompt = prompt + [1 + (salt + number + turn * 17 + place) % 1000 for place in range(MORE)]


def _counts(urls: list[str]) -> tuple[float, float]:
    """Prompt tokens that were found in a prefix cache, and that were looked for."""
    found = {"hits": 0.0, "queries": 0.0}
    for url in urls:
        for name, value in HITS.findall(httpx.get(f"{url}/metrics").text):
            found[name] += float(value)
    return found["hits"], found["queries"]
