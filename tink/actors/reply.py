"""The one-shot replies of those who are asked."""

from __future__ import annotations

from typing import Generic, TypeVar

import trio

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
