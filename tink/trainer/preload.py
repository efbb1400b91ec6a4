"""A process that imports what the engine needs, and forks the server from there: importing takes seconds, a
fork none of them. When a server is killed, the next one is there at once.

The parent never runs Trio and starts no thread, so that what is forked is whole. It does nothing but wait;
what the servers did is in the worker's journal.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import structlog

from tink import crash
from tink.limits import SHORT_LIFE_SECONDS, SHORT_LIVES
from tink.world import World

log = structlog.get_logger("tink.trainer")


class Preloaded:
    """`serve` runs the server in a child, and after one that was killed in another."""

    def __init__(self, run: Callable[[], int], world: World) -> None:
        self._run, self._world = run, world
        self._child = 0
        self._told = False

    def serve(self) -> int:
        """Returns twice: in each child the status of its run; in the parent the status of the child that
        ended by itself or was told to by SIGTERM, which is handed on. The last of SHORT_LIVES takes the
        parent with it, by the same signal."""
        signal.signal(signal.SIGTERM, self._hand_on)
        short = 0
        while True:
            born = self._world.monotonic()
            self._child = pid = os.fork()
            if pid == 0:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                return 0 if self._told else self._run()
            crash.arm("")  # was for the first one
            if self._told:
                os.kill(pid, signal.SIGTERM)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            self._child = 0
            if code >= 0:
                return code
            if self._told:
                break
            short = short + 1 if self._world.monotonic() - born < SHORT_LIFE_SECONDS else 0
            if short == SHORT_LIVES:
                os.kill(os.getpid(), -code)
            log.warning("the server was killed, the next one is forked", pid=pid, signal=-code)
        return 0

    def _hand_on(self, _number: int, _frame: FrameType | None) -> None:
        self._told = True
        if self._child:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self._child, signal.SIGTERM)
