"""One connection per slot: used again when it is clean, closed when it is not, and never lost."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from itertools import count

import httpcore
import httpx
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.unit.journal.journal_kit import cancel_at
from tink import transport
from tink.transport import SlotTransport

Handler = Callable[["Connection"], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Connection:
    """The server's end of one connection."""

    def __init__(self, stream: trio.SocketStream, number: int) -> None:
        self.stream, self.number = stream, number
        self._buffer = b""

    async def request(self) -> bytes:
        """The next request (of no body); raises EndOfChannel at the end of the stream."""
        while b"\r\n\r\n" not in self._buffer:
            part = await self.stream.receive_some()
            if not part:
                raise trio.EndOfChannel
            self._buffer += part
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        return head

    async def answer(self, data: bytes = OK) -> None:
        await self.stream.send_all(data)

    async def reset(self) -> None:
        """Without the FIN that says that all was sent."""
        self.stream.socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await self.stream.aclose()


class Server:
    """`handler` serves each connection; what became of them is counted."""

    def __init__(self, handler: Handler) -> None:
        self._handler, self._numbers = handler, count(1)
        self.opened = self.closed = self.most = 0
        self.url = ""

    async def serve(self, stream: trio.SocketStream) -> None:
        self.opened += 1
        self.most = max(self.most, self.opened - self.closed)
        try:
            await self._handler(Connection(stream, next(self._numbers)))
        except (trio.EndOfChannel, trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self.closed += 1
            await stream.aclose()


@asynccontextmanager
async def serving(handler: Handler, slots: int = 4) -> AsyncIterator[tuple[Server, httpx.AsyncClient]]:
    server = Server(handler)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, server.serve, 0, host="127.0.0.1"))
        host, port = listeners[0].socket.getsockname()
        server.url = f"http://{host}:{port}"
        async with httpx.AsyncClient(
            base_url=server.url, transport=SlotTransport(server.url, slots), trust_env=False, timeout=5
        ) as client:
            with trio.fail_after(20):
                yield server, client
            if not nursery.cancel_scope.cancel_called:
                assert of(client)._slots.borrowed_tokens == 0, "a slot was lost"
        nursery.cancel_scope.cancel()


def of(client: httpx.AsyncClient) -> SlotTransport:
    assert isinstance(client._transport, SlotTransport)
    return client._transport


async def answer_all(connection: Connection) -> None:
    while True:
        await connection.request()
        await connection.answer()


async def test_calls_after_one_another_use_one_connection() -> None:
    async with serving(answer_all) as (server, client):
        for _ in range(5):
            assert (await client.get("/")).content == b"ok"
        assert server.opened == 1


async def test_calls_at_once_use_a_connection_each_and_never_more_than_the_slots() -> None:
    release = trio.Event()

    async def hold(connection: Connection) -> None:
        while True:
            await connection.request()
            await release.wait()
            await connection.answer()

    async with serving(hold, slots=3) as (server, client):
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(client.get, "/")
            while server.opened < 3:
                await wait_all_tasks_blocked(0.01)
            await wait_all_tasks_blocked(0.01)
            assert of(client)._slots.borrowed_tokens == 3
            release.set()
        assert (server.opened, server.most) == (3, 3)
        assert len(of(client)._idle) == 3


async def test_the_connection_used_last_is_used_next() -> None:
    """So that surplus ones fall idle and are dropped."""
    seen: list[int] = []
    held = trio.Event()

    async def note(connection: Connection) -> None:
        while True:
            head = await connection.request()
            seen.append(connection.number)
            if b"/hold" in head:
                await held.wait()
            await connection.answer()

    async with serving(note) as (_, client):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.get, "/hold")
            while not seen:
                await wait_all_tasks_blocked(0.01)
            await client.get("/")
            held.set()
        last = of(client)._idle[-1]
        await client.get("/")
        assert of(client)._idle[-1] is last


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", httpx.RemoteProtocolError),
        (b"nonsense\r\n\r\n", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", httpx.RemoteProtocolError),
    ],
    ids=["nothing", "nonsense", "half a body", "bad chunk"],
)
async def test_a_broken_answer_is_a_transport_error_and_its_connection_is_closed(
    answer: bytes, error: type[Exception]
) -> None:
    async def broken(connection: Connection) -> None:
        await connection.request()
        await connection.answer(answer)

    async with serving(broken) as (server, client):
        for number in range(1, 3):
            with pytest.raises(error) as caught:
                await client.get("/")
            assert isinstance(caught.value, httpx.TransportError)
            assert str(caught.value)
            assert of(client)._idle == []
            assert server.opened == number


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"])
async def test_a_reset_is_a_read_error(sent: bytes) -> None:
    async def resetting(connection: Connection) -> None:
        await connection.request()
        await connection.answer(sent)
        await connection.reset()

    async with serving(resetting) as (_, client):
        with pytest.raises(httpx.ReadError):
            await client.get("/")
        assert of(client)._idle == []


async def test_a_refused_connection_is_a_connect_error_and_leaves_the_slot_free() -> None:
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    url = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(transport=SlotTransport(url, 1), trust_env=False) as client:
        for _ in range(3):
            with trio.fail_after(5), pytest.raises(httpx.ConnectError):
                await client.get(url)
        assert of(client)._slots.borrowed_tokens == 0


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"])
async def test_a_silent_server_is_a_read_timeout(autojump_clock: MockClock, sent: bytes) -> None:
    async def silent(connection: Connection) -> None:
        await connection.request()
        await connection.answer(sent)
        await trio.sleep_forever()

    # The autojump waits until nothing moves, sockets too.
    autojump_clock.autojump_threshold = 0.05
    async with serving(silent) as (_, client):
        with pytest.raises(httpx.ReadTimeout):
            await client.get("/")
        assert of(client)._idle == []


async def test_an_answer_that_is_not_read_to_its_end_closes_the_connection() -> None:
    async def large(connection: Connection) -> None:
        while True:
            await connection.request()
            await connection.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100_000)

    async with serving(large) as (server, client):
        async with client.stream("GET", "/") as answer:
            assert answer.status_code == 200
        assert of(client)._idle == []
        assert len((await client.get("/")).content) == 100_000
        assert server.opened == 2


async def test_a_connection_that_the_server_asked_to_close_is_not_used_again() -> None:
    async def once(connection: Connection) -> None:
        await connection.request()
        await connection.answer(OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))

    async with serving(once) as (server, client):
        for _ in range(3):
            await client.get("/")
        assert server.opened == 3


async def test_an_idle_connection_that_the_server_closed_is_dropped_before_the_call() -> None:
    async def once(connection: Connection) -> None:
        await connection.request()
        await connection.answer()

    async with serving(once) as (server, client):
        for number in range(1, 4):
            assert (await client.get("/")).content == b"ok"
            while server.closed < number:
                await wait_all_tasks_blocked(0.01)
        assert server.opened == 3


async def test_a_connection_that_was_idle_for_long_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "IDLE_CONNECTION_SECONDS", -1.0)
    async with serving(answer_all) as (server, client):
        for _ in range(3):
            await client.get("/")
        assert server.opened == 3


async def test_a_call_that_is_cancelled_anywhere_loses_no_slot_and_spoils_no_connection() -> None:
    async with serving(answer_all, slots=1) as (_, client):
        for step in range(1, 60):

            async def call() -> None:
                assert (await client.get("/")).content == b"ok"

            cancelled = await cancel_at(step, call)
            assert of(client)._slots.borrowed_tokens == 0
            assert len(of(client)._idle) <= 1
            await call()
            if not cancelled:
                assert step > 3
                return
            if step % 2:  # on a new connection too
                while of(client)._idle:
                    await of(client)._idle.pop().aclose()
    raise AssertionError("it never ran to its end")


@pytest.mark.parametrize("read", [True, False])
async def test_a_cancellation_while_an_answer_is_closed_loses_no_slot(read: bool) -> None:
    async with serving(answer_all, slots=1) as (server, client):
        answer = await of(client).handle_async_request(httpx.Request("GET", server.url))
        assert isinstance(answer.stream, httpx.AsyncByteStream)
        if read:
            assert [part async for part in answer.stream] == [b"ok"]
        with trio.CancelScope() as scope:
            scope.cancel()
            await answer.stream.aclose()
        assert of(client)._slots.borrowed_tokens == 0
        assert len(of(client)._idle) == read
        assert (await client.get("/")).content == b"ok"


async def test_a_closed_transport_keeps_no_connection() -> None:
    release = trio.Event()

    async def hold(connection: Connection) -> None:
        while True:
            await connection.request()
            await release.wait()
            await connection.answer()

    async with serving(hold) as (server, client):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.get, "/")
            while not server.opened:
                await wait_all_tasks_blocked(0.01)
            await of(client).aclose()
            release.set()
        assert of(client)._idle == []
        while server.closed < 1:
            await wait_all_tasks_blocked(0.01)


def test_every_error_of_httpcore_has_its_counterpart() -> None:
    request = httpx.Request("GET", "http://localhost")
    kinds = [
        kind
        for kind in vars(httpcore).values()
        if isinstance(kind, type) and issubclass(kind, Exception) and kind.__module__.startswith("httpcore")
    ]
    assert len(kinds) > 10
    for kind in kinds:
        with pytest.raises(httpx.TransportError) as caught, transport._httpx_errors(request):
            raise kind("text")
        assert str(caught.value) == "text"
        if kind is not httpcore.ConnectionNotAvailable:
            assert type(caught.value).__name__ == kind.__name__
