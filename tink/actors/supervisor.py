"""Keeps an actor running. A crash of one is logged and it starts again, with back-off; what it was doing
is taken from the journal again. What stops the worker is a journal that cannot commit, and a bug in the
Router: its state is made anew by the next worker."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog

from tink.actors.backoff import Backoff
from tink.errors import JournalUnavailable, StartupError
from tink.world import World

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 10.0
# An actor that ran this long before it crashed starts again at once.
CALM_SECONDS = 60.0

log = structlog.get_logger()


async def supervise(name: str, run: Callable[[], Awaitable[None]], world: World) -> None:
    """Runs `run()` for ever. Raises what a restart cannot mend: JournalUnavailable, StartupError."""
    backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
    while True:
        started = world.monotonic()
        try:
            await run()
        except* (JournalUnavailable, StartupError):
            raise
        except* Exception:
            log.exception("actor crashed", actor=name, restart_in=backoff.next)
        if world.monotonic() - started > CALM_SECONDS:
            backoff.reset()
        await backoff.pause()
