"""The link to the training server: is one there, which life of it is this, and what has it applied.

The actors that send it work hold a `Life` and give it up when a call fails; `life()` waits until the
server answers again, as the same incarnation or as a new one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

import trio

from tink.backends.trainer import TrainerClient
from tink.domain import rows
from tink.domain.events import TrainerStarted
from tink.errors import BackendError
from tink.limits import HOLD_SECONDS
from tink.wire import tink_train


@dataclass
class Life:
    """One incarnation of the server. `applied`: model -> last op_no, for the models that it holds."""

    client: TrainerClient
    info: tink_train.Info
    lease: int
    applied: dict[str, int] = field(default_factory=dict)

    @property
    def incarnation(self) -> str:
        return self.info.incarnation

    def require_training(self) -> None:
        """Raises BackendError of a server that only samples."""
        if not self.info.trains:
            raise BackendError(
                f"the server at {self.client.url} is a plain {self.info.engine}, which only samples: "
                "training needs `tink trainer --engine megatron` in its place"
            )

    def request(self, job: rows.Job, op_no: int, op: tink_train.Op, *, acked: int) -> tink_train.OpRequest:
        """`acked`: up to which number the model's operations have their terminal events."""
        return tink_train.OpRequest(
            incarnation=self.incarnation,
            lease=self.lease,
            model_id=str(job.model_id),
            op_no=op_no,
            job_id=job.job_id,
            op=op,
            acked=acked,
            wait=HOLD_SECONDS,
        )


class Link(ABC):
    """As those see it who send work. Whoever keeps it sets `_life`, and `_told`: why the server is lost."""

    def __init__(self, served: TrainerStarted | None) -> None:
        """`served`: what is known before a server has answered."""
        self._served = served
        self._life: Life | None = None
        self._arrived = trio.Event()
        self._told: str | None = None

    async def life(self) -> Life:
        """The server's present life; waits for one as long as it takes."""
        await trio.lowlevel.checkpoint()
        while self._life is None:
            await self._arrived.wait()
        return self._life

    async def served(self) -> TrainerStarted:
        """What the server serves, as far as is known: a server that is away for a while comes back with
        the same. Waits only if there never was one."""
        await trio.lowlevel.checkpoint()
        while self._served is None:
            await self.life()
        return self._served

    @property
    def known(self) -> TrainerStarted | None:
        """The same, without waiting."""
        return self._served

    @property
    def present(self) -> Life | None:
        """The life of now, if there is one."""
        return self._life

    @property
    def state(self) -> str:
        """For people: `ready`, or why it is waited for."""
        if self._life is not None:
            info = self._life.info
            return "ready" if info.trains else f"ready: a plain {info.engine}, which only samples"
        return f"awaited: {self._told}" if self._told else "awaited"

    @abstractmethod
    def is_new(self, life: Life) -> bool:
        """Whether it began after this worker: what a former one was running did not survive in it."""

    @abstractmethod
    def exposure(self, *, alone: bool) -> AbstractAsyncContextManager[None]:
        """Around a call that may be the server's death; exposures.py says how."""

    @abstractmethod
    def lost(self, life: Life) -> None:
        """A call of this life failed: no more of it until the server has answered again."""

    @abstractmethod
    def replace(self, life: Life, reason: str) -> None:
        """This life cannot be used any more, though it answers: another server takes its place."""
