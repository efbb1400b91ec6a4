"""The worker's side of `tink-train/1` (tink/wire/tink_train.py)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TypeVar

import msgspec
import trio

from tink.backends.exchange import HttpClient, NoAnswer, exchange
from tink.errors import UNREADABLE, BackendError
from tink.limits import GRACE_SECONDS, HEALTH_SECONDS, POLL_SECONDS, STATE_SECONDS
from tink.wire import tink_train
from tink.wire.tink_train import OpReply, OpRequest, Refusal, SampleReply, SampleRequest
from tink.world import World

T = TypeVar("T")
R = TypeVar("R", OpReply, SampleReply)


class TrainerGone(BackendError):
    """No connection, a wrong answer, a broken one or none in time: whether the call was applied is not
    known. Ask again by op_no."""


class TrainerRefused(BackendError):
    """The trainer answered (with HTTP status `answered`) with a refusal, which says why. Those of the
    protocol's table have done nothing; of others (a 500) that is not known."""

    def __init__(self, status: int, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.answered, self.refusal = status, refusal

    @property
    def invalid(self) -> bool:
        """The request will never be taken, and nothing was done."""
        return self.refusal.error in ("malformed", "too_large")

    @property
    def contradicts(self) -> bool:
        """What the trainer knows of the model, or of its worker, is another history than the journal's."""
        return self.refusal.error in ("result_gone", "op_reused", "fenced")


class TrainerClient:
    """Calls of one trainer. Cancelling a call leaves the job running there: ask again by op_no."""

    def __init__(self, client: HttpClient, url: str) -> None:
        self._client, self.url = client, url

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, url: str, world: World, *, slots: int, token: str = ""
    ) -> AsyncIterator[TrainerClient]:
        async with HttpClient.connect(url, world, slots=slots, token=token) as client:
            yield cls(client, url)

    async def health(self) -> tink_train.Health:
        return await self._json("/v1/health", tink_train.Health)

    async def info(self) -> tink_train.Info:
        return await self._json("/v1/info", tink_train.Info)

    async def state(self) -> tink_train.State:
        return await self._json("/v1/state", tink_train.State)

    async def op(self, request: OpRequest) -> OpReply:
        """Sends an op and waits for its end, through as many long polls as it takes."""
        return await self._op(request, tink_train.encode(request))

    async def submit(self, request: OpRequest) -> None:
        """Sends an op and does not wait for its end: it runs, or is queued behind others of its model."""
        body = tink_train.encode(msgspec.structs.replace(request, wait=0.0))
        self._check_op(request, await self._call("POST", "/v1/ops", OpReply, body, 0.0))

    async def ended(self, request: OpRequest) -> OpReply:
        """Waits for the end of an op that was submitted, through as many long polls as it takes."""
        return await self._op(request, None)

    async def _op(self, request: OpRequest, body: bytes | None) -> OpReply:
        poll = f"/v1/ops/{request.model_id}/{request.op_no}?wait={request.wait}"
        check = partial(self._check_op, request)
        return await self._to_its_end("/v1/ops", body, poll, OpReply, request.wait, check)

    async def sample(self, request: SampleRequest) -> SampleReply:
        """Sends a sample and waits for its end. A pure function of the request: may be sent again."""
        poll = f"/v1/samples/{request.sample_id}?wait={request.wait}"
        check, body = partial(self._check_sample, request), tink_train.encode(request)
        return await self._to_its_end("/v1/samples", body, poll, SampleReply, request.wait, check)

    async def _to_its_end(
        self,
        post: str,
        body: bytes | None,
        poll: str,
        kind: type[R],
        wait: float,
        check: Callable[[R], None],
    ) -> R:
        """`body` None: it was sent before."""
        look = partial(self._call, "GET", poll, kind, None, wait)
        call = look if body is None else partial(self._call, "POST", post, kind, body, wait)
        while True:
            # A call that is not held, though nothing has ended, is paced here.
            earliest = trio.current_time() + min(wait, POLL_SECONDS)
            reply = await call()
            check(reply)
            if reply.state in ("done", "failed"):
                return reply
            await trio.sleep_until(earliest)
            call = look

    def _check_op(self, request: OpRequest, reply: OpReply) -> None:
        """An answer that belongs to another operation must not become the result of this one."""
        if reply.incarnation != request.incarnation:
            raise TrainerGone(f"the trainer at {self.url} was restarted while it worked")
        asked, answered = (request.model_id, request.op_no), (reply.model_id, reply.op_no)
        if asked != answered:
            raise TrainerGone(
                f"the trainer at {self.url} was asked for op {asked[1]} of {asked[0]} and answered for "
                f"op {answered[1]} of {answered[0]}"
            )
        self._check_end(reply.state, done=reply.result is not None, failed=reply.failure is not None)

    def _check_sample(self, request: SampleRequest, reply: SampleReply) -> None:
        if reply.sample_id != request.sample_id:
            raise TrainerGone(
                f"the trainer at {self.url} was asked for {request.sample_id} and answered for "
                f"{reply.sample_id}"
            )
        self._check_end(reply.state, done=True, failed=reply.failure is not None)

    def _check_end(self, state: str, *, done: bool, failed: bool) -> None:
        if not {"done": done, "failed": failed}.get(state, True):
            raise TrainerGone(f"the trainer at {self.url} says {state}, and no more")

    async def snapshot(self, request: tink_train.SnapshotRequest) -> tink_train.SnapshotReply:
        """Repeating it is harmless: what is published under the path is found there."""
        body = tink_train.encode(request)
        return await self._call("POST", "/v1/snapshots", tink_train.SnapshotReply, body, STATE_SECONDS)

    async def restore(self, request: tink_train.RestoreRequest) -> tink_train.RestoreReply:
        """TrainerRefused, with nothing changed, if the snapshot is damaged or the model is not behind
        it."""
        body = tink_train.encode(request)
        return await self._call("POST", "/v1/restores", tink_train.RestoreReply, body, STATE_SECONDS)

    async def _json(self, path: str, kind: type[T]) -> T:
        body = await self._exchange("GET", path, None, HEALTH_SECONDS)
        with self._decoding():
            return msgspec.json.decode(body, type=kind)

    async def _call(self, method: str, path: str, kind: type[T], body: bytes | None, wait: float) -> T:
        answer = await self._exchange(method, path, body, wait + GRACE_SECONDS)
        with self._decoding():
            return msgspec.msgpack.decode(answer, type=kind)

    async def _exchange(
        self,
        method: str,
        path: str,
        body: bytes | None,
        seconds: float,
        media_type: str = tink_train.MEDIA_TYPE,
    ) -> bytes:
        try:
            answer = await exchange(
                self._client, method, path, seconds=seconds, content=body, media_type=media_type
            )
        except NoAnswer as error:
            raise TrainerGone(f"the trainer at {self.url} does not answer: {error}") from error
        if answer.status in (200, 202):
            return answer.content
        with self._decoding():
            raise TrainerRefused(answer.status, msgspec.msgpack.decode(answer.content, type=Refusal))

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        try:
            yield
        except UNREADABLE as error:
            raise TrainerGone(
                f"the trainer at {self.url} does not speak {tink_train.PROTOCOL}: {error}"
            ) from error
