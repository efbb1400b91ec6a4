"""How often a job may be out at a training server that ends: a job that kills its server must not do so
for ever, nor take others with it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from tink import crash
from tink.actors.trainer_link import Life, TrainerLink
from tink.domain import rows
from tink.errors import BackendError


class Attempts:
    """The attempts of one job: one for each life of the server in which it was sent. `begin` journals
    the next one. From the second on the job is out alone, so that only its own death counts."""

    def __init__(
        self, link: TrainerLink, job: rows.Job, begin: Callable[[], Awaitable[None]], *, most: int
    ) -> None:
        self._link, self._job, self._begin, self._most = link, job, begin, most
        self._begun_in: str | None = None

    @asynccontextmanager
    async def call(self) -> AsyncIterator[Life]:
        """Around one call: the life of the server to make it to. Waits until there is one. Raises
        BackendError when the attempts are used up."""
        while True:
            life = await self._link.life()
            if self._begun_in is None and self._job.attempts and not self._link.is_new(life):
                self._begun_in = life.incarnation  # only the worker has changed: the attempt goes on
            fresh = self._begun_in != life.incarnation
            async with self._link.exposure(alone=self._job.attempts + fresh > 1):
                if self._link.present is not life:
                    continue  # it ended while this job waited for its turn
                if fresh:
                    if self._job.attempts >= self._most:
                        raise BackendError(
                            f"the trainer died {self._job.attempts} times while it ran this job; given up "
                            f"after TINK_MAX_ATTEMPTS={self._most}"
                        )
                    await self._begin()
                    crash.point("worker.started")
                    self._begun_in = life.incarnation
                yield life
                return
