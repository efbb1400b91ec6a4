"""The one door to everything that is not a pure function: clock, ids, randomness, threads, network.

Nothing else in Tink reads a clock, draws a random number, makes an id, starts a thread or opens a
socket of its own (tests/unit/test_boundaries.py holds the tree to that). A simulation passes another
World and has the whole worker in its hands.
"""

from __future__ import annotations

import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from tink.errors import StartupError
from tink.limits import BACKLOG

if TYPE_CHECKING:  # not everyone who needs a clock speaks HTTP
    import httpx

T = TypeVar("T")


class World:
    """The real one. Clock readings are seconds; ids are 32 hexadecimal digits."""

    def now(self) -> float:
        """Seconds since the epoch (UTC): for people and for the journal, never for time-outs."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds of an arbitrary clock that never goes back: for durations."""
        return time.monotonic()

    def new_id(self) -> str:
        return uuid.uuid4().hex

    def new_seed(self) -> int:
        """A seed for sampling, 0 <= seed < 2**31."""
        return random.SystemRandom().randrange(2**31)

    async def run_sync(
        self, fn: Callable[..., T], *args: Any, limiter: trio.CapacityLimiter | None = None
    ) -> T:
        """Runs a blocking function off the Trio thread. Uncancellable: it returns when `fn` has."""
        # To name the thread anew for each call, as Trio does else, is a tenth of what the call costs.
        return await trio.to_thread.run_sync(
            fn, *args, abandon_on_cancel=False, limiter=limiter, thread_name="blocking"
        )

    def lock(self) -> threading.Lock:
        """For the threads of `run_sync`."""
        return threading.Lock()

    def listen(self, host: str, port: int) -> socket.socket:
        """A listening TCP socket; port 0 takes a free one. Raises StartupError if it cannot be had."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            return socket.create_server((host, port), family=family, backlog=BACKLOG)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise StartupError(f"cannot listen on {host}, port {port}: {reason}") from error

    def http_transport(self, origin: str, max_slots: int) -> httpx.AsyncBaseTransport:
        """A transport to one backend origin, with at most `max_slots` connections."""
        from tink.transport import SlotTransport

        return SlotTransport(origin, max_slots)
