"""Calls that may be the training server's death: when one of them was, it must be known which."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class Exposures:
    def __init__(self) -> None:
        self._changed = trio.Event()
        self._out, self._suspects, self._alone = 0, 0, False

    @asynccontextmanager
    async def one(self, *, alone: bool) -> AsyncIterator[None]:
        """Around a call. `alone`: no other one is out meanwhile; others wait until it had its turn, or it
        would never have one."""
        self._suspects += alone
        try:
            while self._alone or (self._out if alone else self._suspects):
                await self._changed.wait()
        finally:
            self._suspects -= alone
            self._wake()
        self._alone = alone
        self._out += 1
        try:
            yield
        finally:
            self._out -= 1
            self._alone = False
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
