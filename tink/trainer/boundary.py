"""Where the server calls the engine: what is raised there fails one job, and the server goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import structlog

from tink.errors import TinkError
from tink.trainer.books import failure_of
from tink.wire.tink_train import Failure
from tink.world import World

log = structlog.get_logger("tink.trainer")

T = TypeVar("T")


async def perform(
    world: World, fn: Callable[..., T], *args: Any, **job: Any
) -> tuple[T, None] | tuple[None, Failure]:
    """What `fn` gives, or what its caller is told instead. An error that is no answer is logged, with
    what names the `job`."""
    try:
        return await world.run_sync(fn, *args), None
    except TinkError as error:
        return None, failure_of(error)
    except Exception as error:
        log.exception("engine error", **job)
        return None, failure_of(error)
