"""A process that imports what the engine needs, and forks the server from there: importing takes seconds, a
fork none of them. When a server is killed, the next one is there at once.

The parent never runs Trio and starts no thread, so that what is forked is whole. It does nothing but wait;
what the servers did is in the worker's journal.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import structlog

from tink import crash
from tink.limits import SHORT_LIFE_SECONDS, SHORT_LIVES
from tink.world import World

log = structlog.get_logger("tink.trainer")


# They are waited for, and not handled: one that comes between two lives, or just before it is waited for,
# waits as well, where a handler would have told it to nobody.
AWAITED = frozenset((signal.SIGTERM, signal.SIGCHLD))


class Preloaded:
    """`serve` runs the server in a child, and after one that was killed in another."""

    def __init__(self, run: Callable[[], int], world: World) -> None:
        self._run, self._world = run, world
        self._told = False

    def serve(self) -> int:
        """Returns twice: in each child the status of its run; in the parent the status of the child that
        ended by itself or was told to by SIGTERM, which is handed on. The last of SHORT_LIVES takes the
        parent with it, by the same signal."""
        signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED)
        short = 0
        while True:
            born = self._world.monotonic()
            pid = os.fork()
            if pid == 0:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, AWAITED)
                return self._run()
            crash.arm("")  # was for the first one
            code = self._wait(pid)
            if code >= 0:
                return code
            if self._told:
                break
            short = short + 1 if self._world.monotonic() - born < SHORT_LIFE_SECONDS else 0
            if short == SHORT_LIVES:
                os.kill(os.getpid(), -code)
            log.warning("the server was killed, the next one is forked", pid=pid, signal=-code)
        return 0

    def _wait(self, pid: int) -> int:
        """How the child ended. It is told what its parent is told meanwhile."""
        while True:
            if signal.sigwait(AWAITED) == signal.SIGTERM:
                self._told = True
                os.kill(pid, signal.SIGTERM)  # it may have ended, but was not waited for yet
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
