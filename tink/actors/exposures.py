"""Calls that may be the training server's death: when one of them was, it must be known which."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class Exposures:
    def __init__(self) -> None:
        self._changed = trio.Condition()
        self._out, self._suspects, self._alone = 0, 0, False

    @asynccontextmanager
    async def one(self, *, alone: bool) -> AsyncIterator[None]:
        """Around a call. `alone`: no other one is out meanwhile; others wait until it had its turn, or it
        would never have one."""
        async with self._changed:
            self._suspects += alone
            try:
                while self._alone or (self._out if alone else self._suspects):
                    await self._changed.wait()
            finally:
                self._suspects -= alone
                self._changed.notify_all()
            self._alone = alone
            self._out += 1
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                async with self._changed:
                    self._out -= 1
                    self._alone = False
                    self._changed.notify_all()
