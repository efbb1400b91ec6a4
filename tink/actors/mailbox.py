"""Mailboxes: bounded, typed, and with one-shot replies."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Generic, TypeVar

import trio

M = TypeVar("M")
A = TypeVar("A")


class Reply(Generic[A]):
    """A place for one answer or one error, and the one who waits for it."""

    def __init__(self) -> None:
        self._done = trio.Event()
        self._answer: A | None = None
        self._error: BaseException | None = None
        self.abandoned = False

    def set(self, answer: A) -> None:
        if not self._done.is_set():
            self._answer = answer
            self._done.set()

    def fail(self, error: BaseException) -> None:
        if not self._done.is_set():
            self._error = error
            self._done.set()

    async def wait(self) -> A:
        """The answer, or raises the error. Cancelled: the reply is `abandoned`, and whoever would give
        it may save himself the work."""
        try:
            await self._done.wait()
        except trio.Cancelled:
            self.abandoned = True
            raise
        if self._error is not None:
            raise self._error
        return self._answer  # type: ignore[return-value]  # set() gave an A


class Mailbox(AsyncIterator[M]):
    """A bounded queue with one reader. `capacity` is its back-pressure: `send` waits when it is full."""

    def __init__(self, capacity: int) -> None:
        self._send: trio.MemorySendChannel[M]
        self._receive: trio.MemoryReceiveChannel[M]
        self._send, self._receive = trio.open_memory_channel[M](capacity)

    async def send(self, message: M) -> None:
        await self._send.send(message)

    # No generator: one that its reader leaves, cancelled, would be somebody's to close.
    def __aiter__(self) -> AsyncIterator[M]:
        return self

    async def __anext__(self) -> M:
        return await self._receive.receive()
