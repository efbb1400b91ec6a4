"""What it is worth that a prompt goes where its beginning went, and what it costs. Real vLLM servers on the
CPU, a real worker in this process; the baseline is the same worker without affinity: least outstanding work
alone. In turn, so many rounds of each, every one with prompts of its own; the median counts.

Worth: conversations, each turn a prompt that goes on from the one before. The share of prompt tokens that
were not in a server's prefix cache and had to be computed, and how long all turns take. Cost: groups of
samples whose prompts all begin alike, which affinity alone would send to one server while the others idle.
Tokens a second, with many groups at once and with few.
"""

from __future__ import annotations

import argparse
import array
import logging
import random
import re
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest.mock import patch

import httpx
import msgspec
import structlog
import trio

from tests.bench.figures import Figure
from tests.bench.servers import vllm_servers
from tink.actors import pool
from tink.actors.router import Router
from tink.actors.worker import open_worker
from tink.domain import messages
from tink.home import Home
from tink.journal.journal import Journal
from tink.limits import AFFINITY_TOKENS
from tink.settings import Settings
from tink.wire import tinker_pb2 as pb
from tink.world import World

SUMMARY = "what it is worth, and costs, that prompts go where their beginning went"
TENANT = "default"
# Of the built-in model's.
VOCABULARY = range(10, 1000)
# Tokens of a conversation's first prompt, of what each turn adds, and at most of its answer. Answers differ
# in length, or all conversations would go in step.
FIRST, MORE, ANSWER = 1280, 32, 8
# What they need on the server.
SERVER = ("--max-model-len", "2048", "--num-gpu-blocks-override", "2048")
# Of a group.
SAMPLES, TOKENS = 8, 32
MANY, FEW = 16, 2

HITS = re.compile(r"^vllm:prefix_cache_(hits|queries)_total\{.*\} (\S+)$", re.MULTILINE)


class Round(NamedTuple):
    """Of the conversations: `computed`, the share of prompt tokens, and `seconds` until all have ended. Of
    the groups: `many`, `few`, tokens a second."""

    computed: float
    seconds: float
    many: float
    few: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--conversations", type=int, default=24, help="conversations, all at once (24)")
    parser.add_argument("--turns", type=int, default=8, help="turns of each (8)")
    parser.add_argument("--groups", type=int, default=64, help="groups of 8 samples that begin alike (64)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each; the median counts (5)")
    parser.add_argument("--replicas", type=int, default=2, help="vLLM servers (2)")


def run(arguments: argparse.Namespace) -> Iterator[Figure]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with (
        tempfile.TemporaryDirectory(prefix="tink-bench-") as name,
        vllm_servers(Path(name), arguments.replicas, *SERVER) as urls,
    ):
        spread, together = [], []
        for number in range(arguments.rounds):
            folder = Path(name) / str(number)
            with patch.object(pool, "AFFINITY_SLACK", -(10**9)):
                spread.append(trio.run(measure, folder / "spread", urls, arguments, 2 * number))
            together.append(trio.run(measure, folder / "together", urls, arguments, 2 * number + 1))
    with_, without = (Round(*map(median, zip(*some, strict=True))) for some in (together, spread))
    yield Figure("prompt_tokens_computed", 100 * with_.computed, "%", 100 * without.computed)
    yield Figure("conversations", with_.seconds, "s", without.seconds)
    yield Figure(f"begin_alike_{MANY}_at_once", with_.many, "tokens/s", without.many)
    yield Figure(f"begin_alike_{FEW}_at_once", with_.few, "tokens/s", without.few)


async def measure(folder: Path, urls: list[str], arguments: argparse.Namespace, seed: int) -> Round:
    # No round finds what another has left in the caches.
    chance = random.Random(seed)
    async with _sampling(folder, urls) as sampler:
        before, began = _counts(urls), time.perf_counter()
        async with trio.open_nursery() as nursery:
            for _ in range(arguments.conversations):
                own = random.Random(chance.random())
                nursery.start_soon(_converse, sampler, own, arguments.turns)
        seconds = time.perf_counter() - began
        hits, queries = (after - b for after, b in zip(_counts(urls), before, strict=True))
        many = await _groups(sampler, chance, arguments.groups, MANY)
        few = await _groups(sampler, chance, arguments.groups // (MANY // FEW), FEW)
        return Round(1 - hits / queries, seconds, many, few)


class _Sampler:
    def __init__(self, router: Router, sampler: str) -> None:
        self._router, self._sampler = router, sampler
        self._numbers = count(1)

    async def sample(self, prompt: list[int], samples: int, tokens: int) -> list[int]:
        """The first of the samples."""
        number = next(self._numbers)
        body = {
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": prompt}]},
            "num_samples": samples,
            "sampling_params": {"max_tokens": tokens, "seed": number * samples, "stop": []},
        }
        ask = messages.SubmitSample(TENANT, self._sampler, number, msgspec.json.encode(body))
        promise: messages.Promise = await self._router.ask(ask)
        outcome: messages.Outcome = await self._router.ask(
            messages.AwaitOutcome(TENANT, promise.request_id)
        )
        assert outcome.body is not None, outcome.error
        return list(array.array("i", pb.SampleResponse.FromString(outcome.body).sequences[0].tokens))


@asynccontextmanager
async def _sampling(folder: Path, urls: list[str]) -> AsyncIterator[_Sampler]:
    """A worker on a new home, with all its servers ready, and a sampler of the base model."""
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
        created = await router.ask(messages.CreateSampler(TENANT, session, 0, base_model=base))
        yield _Sampler(router, created.id)


async def _all_ready(router: Router) -> None:
    while True:
        health: messages.Health = await router.ask(messages.GetHealth(""))
        if all(state == "ready" for state in health.servers.values()):
            return
        await trio.sleep(0.1)


async def _converse(sampler: _Sampler, chance: random.Random, turns: int) -> None:
    prompt = chance.choices(VOCABULARY, k=FIRST)
    for _ in range(turns):
        answer = await sampler.sample(prompt, 1, chance.randint(ANSWER // 2, ANSWER))
        prompt = [*prompt, *answer, *chance.choices(VOCABULARY, k=MORE)]


async def _groups(sampler: _Sampler, chance: random.Random, groups: int, at_once: int) -> float:
    """Tokens a second."""
    beginning = chance.choices(VOCABULARY, k=AFFINITY_TOKENS)
    prompts = iter([[*beginning, *chance.choices(VOCABULARY, k=MORE)] for _ in range(groups)])

    async def user() -> None:
        for prompt in prompts:
            await sampler.sample(prompt, SAMPLES, TOKENS)

    began = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(at_once):
            nursery.start_soon(user)
    return groups * SAMPLES * TOKENS / (time.perf_counter() - began)


def _counts(urls: list[str]) -> tuple[float, float]:
    """Prompt tokens that were found in a prefix cache, and that were looked for."""
    found = {"hits": 0.0, "queries": 0.0}
    for url in urls:
        for name, value in HITS.findall(httpx.get(f"{url}/metrics").text):
            found[name] += float(value)
    return found["hits"], found["queries"]
