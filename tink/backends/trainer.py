"""The worker's side of `tink-train/1` (tink/trainer/protocol.py)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

import httpx
import msgspec
import trio

from tink.errors import BackendError
from tink.trainer import protocol
from tink.trainer.protocol import OpReply, OpRequest, Refusal, SampleReply, SampleRequest
from tink.world import World

T = TypeVar("T")

CONNECT_SECONDS = 5.0
# Health is answered off the training thread: this long without an answer is a stuck process.
HEALTH_SECONDS = 5.0
# Writing or reading all of a model's state: gigabytes, on a disk that others use too.
STATE_SECONDS = 600.0
# On top of the seconds that a call asks to be held.
GRACE_SECONDS = 15.0


class TrainerGone(BackendError):
    """No connection, a broken answer or none in time: whether the call was applied is not known. Ask
    again by op_no."""


class Refused(BackendError):
    """The trainer answered (with HTTP status `answered`), and did nothing. `refusal` says why."""

    def __init__(self, status: int, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.answered, self.refusal = status, refusal


class TrainerClient:
    """Calls of one trainer. Cancelling a call leaves the job running there: ask again by op_no."""

    def __init__(self, client: httpx.AsyncClient, url: str) -> None:
        self._client, self.url = client, url

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, url: str, world: World, *, slots: int, token: str = ""
    ) -> AsyncIterator[TrainerClient]:
        async with httpx.AsyncClient(
            base_url=url,
            transport=world.http_transport(url, slots),
            headers={"Authorization": f"Bearer {token}"} if token else {},
            trust_env=False,
        ) as client:
            yield cls(client, url)

    async def health(self) -> protocol.Health:
        return await self._json("/v1/health", protocol.Health)

    async def info(self) -> protocol.Info:
        return await self._json("/v1/info", protocol.Info)

    async def state(self) -> protocol.State:
        return await self._json("/v1/state", protocol.State)

    async def op(self, request: OpRequest) -> OpReply:
        """Sends an op and waits for its end, through as many long polls as it takes."""
        reply = await self._call("POST", "/v1/ops", OpReply, protocol.encode(request), request.wait)
        while reply.state not in ("done", "failed"):
            path = f"/v1/ops/{request.model_id}/{request.op_no}?wait={request.wait}"
            reply = await self._call("GET", path, OpReply, None, request.wait)
            if reply.incarnation != request.incarnation:
                raise TrainerGone(f"the trainer at {self.url} was restarted while it worked")
        return reply

    async def sample(self, request: SampleRequest) -> SampleReply:
        """Sends a sample and waits for its end. A pure function of the request: may be sent again."""
        reply = await self._call("POST", "/v1/samples", SampleReply, protocol.encode(request), request.wait)
        while reply.state not in ("done", "failed"):
            path = f"/v1/samples/{request.sample_id}?wait={request.wait}"
            reply = await self._call("GET", path, SampleReply, None, request.wait)
        return reply

    async def snapshot(self, request: protocol.SnapshotRequest) -> protocol.SnapshotReply:
        """Repeating it is harmless: what is published under the path is found there."""
        body = protocol.encode(request)
        return await self._call("POST", "/v1/snapshots", protocol.SnapshotReply, body, STATE_SECONDS)

    async def restore(self, request: protocol.RestoreRequest) -> protocol.RestoreReply:
        """Refused, with nothing changed, if the snapshot is damaged or the model is not behind it."""
        body = protocol.encode(request)
        return await self._call("POST", "/v1/restores", protocol.RestoreReply, body, STATE_SECONDS)

    async def _json(self, path: str, kind: type[T]) -> T:
        body = await self._exchange("GET", path, None, HEALTH_SECONDS)
        with self._decoding():
            return msgspec.json.decode(body, type=kind)

    async def _call(self, method: str, path: str, kind: type[T], body: bytes | None, wait: float) -> T:
        answer = await self._exchange(method, path, body, wait + GRACE_SECONDS)
        with self._decoding():
            return msgspec.msgpack.decode(answer, type=kind)

    async def _exchange(self, method: str, path: str, body: bytes | None, seconds: float) -> bytes:
        if self._client.is_closed:
            # The link gave this server up while a call through it was being polled.
            raise TrainerGone(f"the link to the trainer at {self.url} is closed")
        try:
            # One deadline for the whole exchange: a trickle of bytes would reset httpx's own time-outs.
            with trio.fail_after(seconds):
                answer = await self._client.request(
                    method,
                    path,
                    content=body,
                    headers={"Content-Type": protocol.MEDIA_TYPE} if body is not None else {},
                    timeout=httpx.Timeout(seconds, connect=CONNECT_SECONDS),
                )
        except (httpx.HTTPError, trio.TooSlowError) as error:
            reason = str(error) or type(error).__name__
            raise TrainerGone(f"the trainer at {self.url} does not answer: {reason}") from error
        if answer.status_code in (200, 202):
            return answer.content
        with self._decoding():
            raise Refused(answer.status_code, msgspec.msgpack.decode(answer.content, type=Refusal))

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        try:
            yield
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise TrainerGone(
                f"the trainer at {self.url} does not speak {protocol.PROTOCOL}: {error}"
            ) from error
