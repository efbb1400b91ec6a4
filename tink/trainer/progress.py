"""Signs of life from inside an operation: a long one that goes on is told from one that hangs.

The server makes a `Work` and runs the engine within `working`; whatever the engine loops over, it says
`beat()` in each turn. The work travels in the context, which a thread inherits from the task that started
it, so that nothing in between has to hand it on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tink.wire.tink_train import Running


class Idleness:
    """For how long a server does nothing, between the works of its lanes. `clock` as that of a Work."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._works = 0
        self._since: float | None = None  # its first work has not ended
        self._seconds = 0.0

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """While the body runs, there is work."""
        if self._since is not None and not self._works:
            self._seconds += self._clock() - self._since
        self._works += 1
        try:
            yield
        finally:
            self._works -= 1
            self._since = self._clock()

    def take(self) -> float:
        """The idle seconds until now that nobody has taken."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class Work:
    """What the server computes for one model or sample. `clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float], model_id: str, op_no: int, job_id: str) -> None:
        self._clock = clock
        self._model_id, self._op_no, self._job_id = model_id, op_no, job_id
        self._began = self._beaten = clock()

    def beat(self) -> None:
        self._beaten = self._clock()

    @property
    def seconds(self) -> float:
        return self._clock() - self._began

    def running(self) -> Running:
        idle = self._clock() - self._beaten
        return Running(self._model_id, self._op_no, self._job_id, self.seconds, idle)


_working: ContextVar[Work | None] = ContextVar("working", default=None)


@contextmanager
def working(work: Work) -> Iterator[None]:
    """What runs in the body, threads that it starts included, is this work."""
    token = _working.set(work)
    try:
        yield
    finally:
        _working.reset(token)


def beat() -> None:
    """The work of this context goes on. Without one, nothing."""
    work = _working.get()
    if work is not None:
        work.beat()
