"""How often a job may be sent: a job that kills its training server must not do so for ever, nor take
others with it, and a server that answers wrongly must not be asked as fast as it answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from tink import crash
from tink.actors.backoff import Backoff
from tink.actors.link import Life, Link
from tink.backends.trainer import TrainerGone, TrainerRefused
from tink.domain import rows
from tink.errors import BackendError
from tink.limits import WRONG_ANSWERS


class Attempts:
    """The attempts of one job: one for each life of the server in which it was sent. `begin` journals
    the next one. From the second on the job is out alone, so that only its own death counts."""

    def __init__(
        self,
        link: Link,
        job: rows.Job,
        begin: Callable[[], Awaitable[None]],
        *,
        most: int,
        begun_in: str | None = None,
        innocent: bool = False,
    ) -> None:
        """`begun_in`: the life in which the job has begun already. `innocent`: if that is no more before
        the first call, it was not this job's doing, and does not count."""
        self._link, self._job, self._begin, self._most = link, job, begin, most
        self._begun_in, self._innocent = begun_in, innocent
        self._excused = 0
        self._backoff = Backoff()
        # The life whose last answer was wrong, what it had applied then, and how often in a row.
        self._wrong_in: tuple[str, int | None] = ("", None)
        self._wrong = 0

    def excuse(self) -> None:
        """The last call may have been lost to another one that was out: that one attempt does not count.
        Once: the next is out alone."""
        self._innocent = not self._excused

    @asynccontextmanager
    async def call(self) -> AsyncIterator[Life]:
        """Around one call: the life of the server to make it to. Waits until there is one, and after a
        call that failed in it a while longer each time; one that fails too often is replaced. Raises
        BackendError when the attempts are used up."""
        while True:
            life = await self._link.life()
            if life.incarnation == self._wrong_in[0]:
                await self._backoff.pause()
                life = await self._link.life()
            if self._begun_in is None and self._job.attempts and not self._link.is_new(life):
                self._begun_in = life.incarnation  # only the worker has changed: the attempt goes on
            fresh = self._begun_in != life.incarnation
            async with self._link.exposure(alone=self._job.attempts + fresh > 1):
                if self._link.present is not life:
                    continue  # it ended while this job waited for its turn
                if fresh:
                    self._excused += self._innocent
                    died = self._job.attempts - self._excused
                    if died >= self._most:
                        raise BackendError(
                            f"the trainer died {died} times while it ran this job; given up "
                            f"after TINK_MAX_ATTEMPTS={self._most}"
                        )
                    await self._begin()
                    crash.point("worker.started")
                    self._begun_in = life.incarnation
                self._innocent = False
                with self._counting(life):
                    yield life
                return

    @contextmanager
    def _counting(self, life: Life) -> Iterator[None]:
        try:
            yield
        except (TrainerGone, TrainerRefused) as error:
            place = life.incarnation, life.applied.get(str(self._job.model_id))
            if place != self._wrong_in:
                self._wrong_in, self._wrong = place, 0
                self._backoff.reset()
            # A server that is busy says so, and is right.
            self._wrong += not (isinstance(error, TrainerRefused) and error.refusal.error == "busy")
            if self._wrong >= WRONG_ANSWERS:
                self._link.replace(life, f"{self._wrong} answers in a row were wrong, the last: {error}")
            raise
