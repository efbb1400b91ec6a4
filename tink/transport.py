"""One connection per slot.

httpx's own pool looks through every connection for every request, which costs 20 ms of CPU a call at a
thousand in flight. Here the caller's limiter is the queue, and this transport only keeps idle
connections for the next call: cost per call is the same at any number in flight.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from types import TracebackType

import httpcore
import httpx
import trio

from tink.limits import IDLE_CONNECTION_SECONDS, TCP_IDLE_SECONDS, TCP_PROBE_SECONDS, TCP_PROBES

# The kernel asks a silent peer whether it is there.
PROBED = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
if hasattr(socket, "TCP_KEEPIDLE"):  # not on macOS: there it begins after two hours
    PROBED += [
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, TCP_IDLE_SECONDS),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, TCP_PROBE_SECONDS),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, TCP_PROBES),
    ]


class SlotTransport(httpx.AsyncBaseTransport):
    """A LIFO free list of connections to one origin, never more than `max_slots` in use at a time.

    A connection comes back to the list only after its answer was read to the end; on any exception or
    cancellation it is closed. No retries and no proxies: the caller decides what an error means.
    """

    def __init__(self, origin: str, max_slots: int) -> None:
        url = httpx.URL(origin)
        self._origin = httpcore.Origin(
            url.raw_scheme, url.raw_host, url.port or (443 if url.scheme == "https" else 80)
        )
        self._slots = trio.CapacityLimiter(max_slots)
        self._idle: list[httpcore.AsyncHTTPConnection] = []
        self._closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        token = object()
        await self._slots.acquire_on_behalf_of(token)
        connection: httpcore.AsyncHTTPConnection | None = None
        try:
            connection = await self._take()
            with _httpx_errors(request):
                answer = await connection.handle_async_request(
                    httpcore.Request(
                        method=request.method,
                        url=httpcore.URL(
                            scheme=request.url.raw_scheme,
                            host=request.url.raw_host,
                            port=request.url.port,
                            target=request.url.raw_path,
                        ),
                        headers=request.headers.raw,
                        content=request.stream,
                        extensions=request.extensions,
                    )
                )
        except BaseException:
            if connection is None:
                self._slots.release_on_behalf_of(token)
            else:
                await self.give_back(connection, token, clean=False)
            raise
        return httpx.Response(
            status_code=answer.status,
            headers=answer.headers,
            stream=_Body(self, connection, token, answer, request),
            extensions=answer.extensions,
        )

    async def _take(self) -> httpcore.AsyncHTTPConnection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_available() and not connection.has_expired():
                return connection
            await _close(connection)
        return httpcore.AsyncHTTPConnection(
            self._origin, keepalive_expiry=IDLE_CONNECTION_SECONDS, socket_options=PROBED
        )

    async def give_back(
        self, connection: httpcore.AsyncHTTPConnection, token: object, *, clean: bool
    ) -> None:
        try:
            if clean and connection.is_idle() and not self._closed:
                self._idle.append(connection)
            else:
                await _close(connection)
        finally:
            self._slots.release_on_behalf_of(token)

    async def aclose(self) -> None:
        """Closes what is idle; calls under way go on, and close theirs."""
        self._closed = True
        while self._idle:
            await _close(self._idle.pop())

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self.aclose()


class _Body(httpx.AsyncByteStream):
    """The answer's bytes; closing it gives the connection back."""

    def __init__(
        self,
        transport: SlotTransport,
        connection: httpcore.AsyncHTTPConnection,
        token: object,
        answer: httpcore.Response,
        request: httpx.Request,
    ) -> None:
        self._transport, self._connection, self._token = transport, connection, token
        self._answer, self._request = answer, request
        self._read_to_the_end = False
        self._closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _httpx_errors(self._request):
            async for part in self._answer.aiter_stream():
                yield part
        self._read_to_the_end = True

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        # Shielded: a cancellation here would keep the slot for ever.
        with trio.CancelScope(shield=True):
            if self._read_to_the_end:
                await self._answer.aclose()
            await self._transport.give_back(self._connection, self._token, clean=self._read_to_the_end)


async def _close(connection: httpcore.AsyncHTTPConnection) -> None:
    """At once, whatever is under way on it."""
    with trio.CancelScope(shield=True):
        await connection.aclose()


@contextlib.contextmanager
def _httpx_errors(request: httpx.Request) -> Iterator[None]:
    """httpcore's errors as httpx's of the same name, all of them TransportErrors."""
    try:
        yield
    except _ERRORS as error:
        kind = getattr(httpx, type(error).__name__, httpx.TransportError)
        raise kind(str(error) or type(error).__name__, request=request) from error


_ERRORS = (
    httpcore.TimeoutException,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.ProxyError,
    httpcore.UnsupportedProtocol,
    httpcore.ConnectionNotAvailable,
)
