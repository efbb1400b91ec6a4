"""The world of a worker that is replayed: clock and chance say what they said then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import httpx
import trio

from tink.world import World

T = TypeVar("T")


class RecordedWorld(World):
    """`at`, `next_id`, `next_seed`: of the event that is being replayed."""

    def __init__(self) -> None:
        self.at = 0.0
        self.next_id = ""
        self.next_seed = 0

    def now(self) -> float:
        return self.at

    def monotonic(self) -> float:
        return trio.current_time()

    def new_id(self) -> str:
        return self.next_id

    def new_seed(self) -> int:
        return self.next_seed

    async def run_sync(
        self, fn: Callable[..., T], *args: Any, limiter: trio.CapacityLimiter | None = None
    ) -> T:
        await trio.lowlevel.checkpoint()
        return fn(*args)

    def http_transport(self, origin: str, max_slots: int) -> httpx.AsyncBaseTransport:
        raise AssertionError("a replay reaches no server")
