"""Which kind of sampling server answers at a URL."""

from __future__ import annotations

from typing import Literal

import msgspec

from tink.backends.exchange import HttpAnswer, HttpClient, NoAnswer, exchange
from tink.backends.replica import ReplicaGone, ReplicaRefused
from tink.domain.routing import NO_VLLM
from tink.errors import UNREADABLE
from tink.limits import HEALTH_SECONDS
from tink.world import World

Flavour = Literal["vllm", "trl"]


async def flavour(url: str, world: World, token: str = "") -> Flavour:
    """`trl` is a `trl vllm-serve` before 1.11 (see TrlClient); later ones start a `vllm serve`. Raises
    ReplicaGone if nothing answers, or not yet, and ReplicaRefused if it is neither. `token`: its
    `--api-key`."""
    async with HttpClient.connect(url, world, slots=1, token=token) as client:

        async def get(path: str) -> HttpAnswer:
            try:
                answer = await exchange(client, "GET", path, seconds=HEALTH_SECONDS)
            except NoAnswer as error:
                raise ReplicaGone(f"{NO_VLLM} at {url}: {error}") from error
            if answer.status >= 500:
                raise ReplicaGone(f"what answers at {url} is not ready: {path} gives {answer.status}")
            return answer

        # 401 or 403: it has models, and wants its API key.
        if (await get("/v1/models")).status in (200, 401, 403):
            return "vllm"
        size = await get("/get_world_size/")
        if size.status == 200 and _has(size.content, "world_size"):
            return "trl"
    raise ReplicaRefused(f"what answers at {url} is neither `vllm serve` nor `trl vllm-serve`")


def _has(content: bytes, key: str) -> bool:
    try:
        return key in msgspec.json.decode(content, type=dict[str, object])
    except UNREADABLE:
        return False
