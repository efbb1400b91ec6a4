"""One HTTP exchange with one deadline, read whole, and the client that makes it. The one place where
httpx's errors are translated."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import NamedTuple

import httpx
import trio

from tink.limits import CONNECT_SECONDS, MAX_ANSWER
from tink.world import World

_UNSENT = (httpx.ConnectError, httpx.ConnectTimeout)
# What a call on a kept-alive connection meets that the server has just closed.
_STALE = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)


class NoAnswer(Exception):
    """No connection, a broken one, or no whole answer in time. `sent`: the server may have had the call, so
    that whether it was served is not known. `late`: the time was up."""

    def __init__(self, reason: str, *, sent: bool, late: bool = False) -> None:
        super().__init__(reason)
        self.sent, self.late = sent, late


class HttpAnswer(NamedTuple):
    status: int
    content: bytes


class HttpClient:
    """For the exchanges with one server. httpx's own does more for a call (cookies, redirects, what the
    environment says), and costs half a millisecond of CPU each time."""

    def __init__(self, url: str, transport: httpx.AsyncBaseTransport, headers: Mapping[str, str]) -> None:
        self.url, self.is_closed = url, False
        self._transport, self._headers = transport, headers

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, url: str, world: World, *, slots: int, token: str = ""
    ) -> AsyncIterator[HttpClient]:
        """`slots`: connections, so calls at once; more wait, their deadlines running. `token`: what the
        server wants as bearer."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with world.http_transport(url, slots) as transport:
            client = cls(url.rstrip("/"), transport, headers)
            try:
                yield client
            finally:
                client.is_closed = True

    @asynccontextmanager
    async def call(
        self, method: str, path: str, content: bytes | None, media_type: str, seconds: float
    ) -> AsyncIterator[httpx.Response]:
        """The answer, whose stream is closed at the end of the block. Raises httpx's errors."""
        timeout = httpx.Timeout(seconds, connect=CONNECT_SECONDS)
        request = httpx.Request(
            method,
            _url(f"{self.url}{path}"),
            headers=self._headers if content is None else {**self._headers, "Content-Type": media_type},
            content=content,
            extensions={"timeout": timeout.as_dict()},
        )
        answer = await self._transport.handle_async_request(request)
        try:
            yield answer
        finally:
            assert isinstance(answer.stream, httpx.AsyncByteStream)
            await answer.stream.aclose()


# Most are asked again and again, and to take one apart costs as much as to send the request.
_url = lru_cache(httpx.URL)


async def exchange(
    client: HttpClient,
    method: str,
    path: str,
    *,
    seconds: float,
    content: bytes | None = None,
    media_type: str = "application/json",
    again: bool = False,
) -> HttpAnswer:
    """Raises NoAnswer, after `seconds` at the latest. `again`: a call whose connection was closed on it is
    made once more, on another one; only for what may be served twice. Cancelled, it closes its own."""
    if client.is_closed:
        raise NoAnswer("the link to it is closed", sent=False)
    received, broken = bytearray(), False
    try:
        # One deadline for the whole exchange: a trickle of bytes would reset httpx's own time-outs.
        with trio.fail_after(seconds) as scope:
            while True:
                try:
                    async with client.call(method, path, content, media_type, seconds) as answer:
                        assert isinstance(answer.stream, httpx.AsyncByteStream)
                        async for part in answer.stream:
                            received += part
                            if len(received) > MAX_ANSWER:
                                scope.cancel()  # not a break: httpx's generators end by exceptions alone
                    return HttpAnswer(answer.status_code, bytes(received))
                except _STALE:
                    if not again or client.is_closed:
                        raise
                    # It may have been the call that has killed the server.
                    again, broken = False, True
                    received.clear()
    except (httpx.HTTPError, trio.TooSlowError) as error:
        reason = str(error) or type(error).__name__
        late = isinstance(error, trio.TooSlowError | httpx.ReadTimeout | httpx.WriteTimeout)
        if len(received) > MAX_ANSWER:
            reason, late = f"its answer is longer than {MAX_ANSWER} bytes", False
        raise NoAnswer(reason, sent=broken or not isinstance(error, _UNSENT), late=late) from error
