"""Sampling requests: a bounded queue before SAMPLE_SLOTS threads, and their answers for a while.

A sample is a pure function of its request, so nothing is lost when an answer is dropped: the worker
sends the request again. Answers are kept for the poll that was lost, not as the truth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import structlog
import trio

from tink import crash
from tink.limits import (
    MAX_OP_WAIT,
    SAMPLE_KEEP_BYTES,
    SAMPLE_KEEP_SECONDS,
    SAMPLE_SLOTS,
    TRAINER_QUEUE,
)
from tink.trainer.books import Refused
from tink.trainer.boundary import perform
from tink.trainer.engines.interface import Engine
from tink.trainer.progress import Work, working
from tink.wire.tink_train import Running, SampleReply, SampleRequest
from tink.world import World

log = structlog.get_logger("tink.trainer")


@dataclass
class Entry:
    request: SampleRequest
    reply: SampleReply
    ended: trio.Event = field(default_factory=trio.Event)
    ended_at: float = 0.0


class Samples:
    """`refuse(status, error, message, retryable=...)` makes the refusals, which carry the incarnation."""

    def __init__(
        self, world: World, engine: Engine, refuse: Callable[..., Refused], nursery: trio.Nursery
    ) -> None:
        self._world = world
        self._engine = engine
        self._refuse = refuse
        self._nursery = nursery
        self._slots = trio.CapacityLimiter(SAMPLE_SLOTS)
        # In the order in which they came; `_kept` has those that ended, in the order in which they did.
        self._entries: dict[str, Entry] = {}
        self._kept: dict[str, Entry] = {}
        self._kept_bytes = 0
        self._work: dict[str, Work] = {}
        self._finishing = False

    async def finish(self) -> None:
        """Starts nothing more, and returns when nothing runs."""
        self._finishing = True
        for _ in range(SAMPLE_SLOTS):
            await self._slots.acquire_on_behalf_of(object())

    def running(self) -> list[Running]:
        return [work.running() for work in self._work.values()]

    async def submit(self, request: SampleRequest) -> SampleReply:
        """Waits at most `request.wait` seconds. A known sample_id joins what there is."""
        self._forget()
        wait, request = request.wait, msgspec.structs.replace(request, wait=0.0)
        entry = self._entries.get(request.sample_id)
        if entry is None:
            if len(self._entries) - len(self._kept) >= TRAINER_QUEUE:
                raise self._refuse(
                    429, "busy", f"{TRAINER_QUEUE} samples are waiting already", retryable=True
                )
            entry = Entry(request, SampleReply("queued", request.sample_id))
            self._entries[request.sample_id] = entry
            self._nursery.start_soon(self._perform, entry)
        elif entry.request != request:
            raise self._refuse(422, "op_reused", f"sample {request.sample_id} was sent with other fields")
        return await self._wait(entry, wait)

    async def poll(self, sample_id: str, wait: float) -> SampleReply:
        self._forget()
        entry = self._entries.get(sample_id)
        if entry is None:
            raise self._refuse(404, "no_sample", f"sample {sample_id} is not here: send it again")
        return await self._wait(entry, wait)

    async def _wait(self, entry: Entry, wait: float) -> SampleReply:
        with trio.move_on_after(min(max(0.0, wait), MAX_OP_WAIT)):
            await entry.ended.wait()
        return entry.reply

    async def _perform(self, entry: Entry) -> None:
        request = entry.request
        async with self._slots:
            if self._finishing:
                return
            entry.reply = SampleReply("running", request.sample_id)
            work = Work(self._world.monotonic, "", 0, request.sample_id)
            self._work[request.sample_id] = work
            try:
                with working(work):
                    sampled, failure = await perform(
                        self._world, self._engine.sample, request, sample=request.sample_id
                    )
            finally:
                del self._work[request.sample_id]
        if sampled is None:
            entry.reply = SampleReply("failed", request.sample_id, failure=failure)
        else:
            entry.reply = SampleReply(
                "done",
                request.sample_id,
                sampled.body,
                sampled.tokens_in,
                sampled.tokens_out,
                run_ms=work.seconds * 1000,
            )
        log.info(
            "sample",
            sample=request.sample_id,
            state=entry.reply.state,
            ms=round(work.seconds * 1000, 1),
            tokens_in=entry.reply.tokens_in,
            tokens_out=entry.reply.tokens_out,
            failure=entry.reply.failure.message if entry.reply.failure else None,
        )
        crash.point("trainer.sampled")
        entry.ended_at = self._world.monotonic()
        self._kept[request.sample_id] = entry
        self._kept_bytes += len(entry.reply.body)
        entry.ended.set()

    def _forget(self) -> None:
        """Drops answers that are old, and the oldest while there are too many bytes of them."""
        horizon = self._world.monotonic() - SAMPLE_KEEP_SECONDS
        for sample_id, entry in list(self._kept.items()):
            if entry.ended_at > horizon and self._kept_bytes <= SAMPLE_KEEP_BYTES:
                break
            self._kept_bytes -= len(entry.reply.body)
            del self._kept[sample_id], self._entries[sample_id]
