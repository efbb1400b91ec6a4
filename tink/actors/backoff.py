"""Pauses that double, so that what goes wrong at once is not tried at once, for ever."""

from __future__ import annotations

import trio

from tink.limits import LONGEST_PAUSE_SECONDS, PAUSE_SECONDS


class Backoff:
    """`pause()` sleeps for `first` seconds, then twice as long each time, up to `longest`."""

    def __init__(self, first: float = PAUSE_SECONDS, longest: float = LONGEST_PAUSE_SECONDS) -> None:
        self._first, self._longest = first, longest
        self.next = first

    def reset(self) -> None:
        """It went well."""
        self.next = self._first

    async def pause(self) -> None:
        seconds, self.next = self.next, min(2 * self.next, self._longest)
        await trio.sleep(seconds)
