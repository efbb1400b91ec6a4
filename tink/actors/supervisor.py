"""Keeps an actor running. A crash of one is logged and it starts again, with back-off; what it was doing
is taken from the journal again. What stops the worker is a journal that cannot commit, and a bug in the
Router: its state is made anew by the next worker."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog

from tink.actors.backoff import Backoff
from tink.errors import JournalUnavailable, StartupError
from tink.limits import CALM_SECONDS, LONGEST_ACTOR_PAUSE_SECONDS
from tink.world import World

log = structlog.get_logger()


async def supervise(name: str, run: Callable[[], Awaitable[None]], world: World) -> None:
    """Runs `run()` for ever. Raises what a restart cannot mend: JournalUnavailable, StartupError."""
    backoff = Backoff(longest=LONGEST_ACTOR_PAUSE_SECONDS)
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
