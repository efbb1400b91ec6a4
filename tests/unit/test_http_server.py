"""Every request gets its answer or learns that there is none, and nobody can hold the server up."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any

import pytest
import trio
import trio.lowlevel
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from tests.hosted import hosted
from tink import http_server
from tink.limits import MAX_HEAD_BYTES
from tink.world import World

SECONDS = 30.0
GET = b"GET /%s HTTP/1.1\r\nHost: here\r\n\r\n"
POST = b"POST /echo HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n"


class Site:
    """An application, and what became of the requests that it does not answer at once."""

    def __init__(self) -> None:
        self.told: SimpleQueue[str] = SimpleQueue()
        self.began, self.go = trio.Event(), trio.Event()

    async def make(self, nursery: trio.Nursery) -> http_server.App:
        await trio.lowlevel.checkpoint()
        self._token = trio.lowlevel.current_trio_token()
        paths = (self.echo, self.wait, self.watch, self.bug, self.lots)
        return Starlette(
            routes=[Route(f"/{path.__name__}", path, methods=["GET", "POST"]) for path in paths]
        )

    def let_go(self) -> None:
        self._token.run_sync_soon(self.go.set)

    async def echo(self, request: Request) -> Response:
        await trio.lowlevel.checkpoint()  # it runs on Trio
        return Response(await request.body())

    async def wait(self, request: Request) -> Response:
        """Until it is let go, or cancelled."""
        self.told.put("waits")
        self.began.set()
        try:
            await self.go.wait()
        finally:
            self.told.put("done" if self.go.is_set() else "cancelled")
        return Response(b"at last")

    async def watch(self, request: Request) -> Response:
        self.told.put("waits")
        try:
            async for _ in request.stream():
                pass
            message = await request.receive()
        except ClientDisconnect:
            message = {"type": "http.disconnect"}
        self.told.put(message["type"])
        return Response(b"")

    async def bug(self, request: Request) -> Response:
        await trio.lowlevel.checkpoint()
        raise ValueError("a bug")

    async def lots(self, request: Request) -> Response:
        await trio.lowlevel.checkpoint()
        return Response(bytes(50_000_000))


@pytest.fixture
def site() -> Site:
    return Site()


@pytest.fixture
def url(site: Site) -> Iterator[str]:
    with hosted(site.make) as host:
        yield host.url


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=SECONDS) as connection:
        yield connection


def answer(connection: socket.socket) -> tuple[int, bytes]:
    """Status and content of the next one."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += (part := connection.recv(1))
        assert part, received
    found = re.search(rb"content-length: (\d+)", received, re.IGNORECASE)
    content = b""
    while found and len(content) < int(found[1]):
        content += connection.recv(int(found[1]) - len(content))
    return int(received.split(b" ")[1]), content


def rest(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    received = b""
    try:
        while part := connection.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    return received


def test_a_connection_takes_one_request_after_the_other(url: str) -> None:
    with connected(url) as connection:
        for content in (b"one", b"two", bytes(5_000_000)):
            connection.sendall(POST % len(content) + content)
            assert answer(connection) == (200, content)


def test_requests_that_are_sent_at_once_are_answered_in_their_order(url: str) -> None:
    with connected(url) as connection:
        connection.sendall(b"".join(POST % 1 + b"%d" % number for number in range(5)))
        assert [answer(connection)[1] for _ in range(5)] == [b"%d" % number for number in range(5)]


def test_a_request_that_comes_in_pieces_is_one(url: str) -> None:
    with connected(url) as connection:
        for byte in POST % 3 + b"abc":
            connection.sendall(bytes([byte]))
        assert answer(connection) == (200, b"abc")


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"GET /echo HTTP/1.1\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: here\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST /echo HTTP/1.1\r\nHost: here\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0",
        b"GET /echo HTTP/1.1\r\nHost: here\r\nX : space\r\n\r\n",
    ],
    ids=["no HTTP", "no host", "two lengths", "length and chunks", "space before a colon"],
)
def test_what_is_no_request_is_refused_and_the_connection_closed(url: str, sent: bytes) -> None:
    with connected(url) as connection:
        connection.sendall(sent)
        assert rest(connection).startswith(b"HTTP/1.1 400 ")


def test_a_head_without_end_is_refused_and_its_sender_gets_to_read_why(url: str) -> None:
    with connected(url) as connection:
        connection.sendall(
            b"GET /echo HTTP/1.1\r\nHost: here\r\nX: " + bytes(20 * MAX_HEAD_BYTES).replace(b"\0", b"x")
        )
        connection.shutdown(socket.SHUT_WR)
        assert rest(connection).startswith(b"HTTP/1.1 400 ")


def test_who_is_refused_may_go_on_sending_and_is_not_answered_again(url: str) -> None:
    with connected(url) as connection:
        for _ in range(10):
            connection.sendall(b"nonsense\r\n\r\n" + POST % 2 + b"ok")
        connection.shutdown(socket.SHUT_WR)
        assert rest(connection).count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("sent", [b"", b"GET /echo HTTP/1.1\r\nHost:"], ids=["nothing", "half a head"])
def test_who_sends_no_whole_request_is_not_waited_for(site: Site, sent: bytes) -> None:
    with hosted(site.make, idle_seconds=0.1) as host, connected(host.url) as connection:
        connection.sendall(sent)
        assert rest(connection) == b""


def test_a_request_that_is_being_answered_is_not_idle(site: Site) -> None:
    with (
        hosted(site.make, idle_seconds=0.1) as host,
        connected(host.url) as waiting,
        connected(host.url) as idle,
    ):
        waiting.sendall(GET % b"wait")
        assert site.told.get(timeout=SECONDS) == "waits"
        assert rest(idle) == b""  # so long has it waited by now
        site.let_go()
        assert answer(waiting) == (200, b"at last")


def test_the_application_is_told_when_a_client_has_gone(site: Site, url: str) -> None:
    with connected(url) as connection:
        connection.sendall(GET % b"watch")
        assert site.told.get(timeout=SECONDS) == "waits"
    assert site.told.get(timeout=SECONDS) == "http.disconnect"


def test_a_client_that_does_not_read_holds_up_nobody_else(url: str) -> None:
    with connected(url) as silent, connected(url) as other:
        silent.sendall(GET % b"lots")
        other.sendall(POST % 2 + b"ok")
        assert answer(other) == (200, b"ok")
        assert answer(silent) == (200, bytes(50_000_000))


def test_an_error_of_the_application_ends_its_own_request_alone(url: str) -> None:
    with connected(url) as connection, connected(url) as other:
        connection.sendall(GET % b"bug")
        assert answer(connection)[0] == 500
        other.sendall(POST % 2 + b"ok")
        assert answer(other) == (200, b"ok")


def test_at_the_end_idle_connections_go_at_once_and_the_others_are_answered(site: Site) -> None:
    with ExitStack() as connections, hosted(site.make, last_seconds=SECONDS) as host:
        idle, waiting = (connections.enter_context(connected(host.url)) for _ in range(2))
        idle.sendall(POST % 2 + b"ok")
        assert answer(idle) == (200, b"ok")
        waiting.sendall(GET % b"wait")
        assert site.told.get(timeout=SECONDS) == "waits"
        host.end()
        assert rest(idle) == b""
        site.let_go()
        assert answer(waiting) == (200, b"at last")
        assert rest(waiting) == b""


def test_what_takes_too_long_at_the_end_is_cancelled(site: Site) -> None:
    with hosted(site.make, last_seconds=0.1) as host, connected(host.url) as connection:
        connection.sendall(GET % b"wait")
        assert site.told.get(timeout=SECONDS) == "waits"
    assert site.told.get(timeout=SECONDS) == "cancelled"


def test_a_server_that_is_cancelled_cuts_all_off(site: Site) -> None:
    async def main() -> bytes:
        listener = World().listen("127.0.0.1", 0)
        with listener as port:
            url = f"http://127.0.0.1:{port.getsockname()[1]}"
            async with trio.open_nursery() as nursery:
                app = await site.make(nursery)
                serve = partial(http_server.serve, app, port, stop=trio.Event())
                await nursery.start(partial(serve, idle_seconds=SECONDS, last_seconds=SECONDS))
                stream = await trio.open_tcp_stream("127.0.0.1", int(url.rpartition(":")[2]))
                await stream.send_all(GET % b"wait")
                await site.began.wait()
                nursery.cancel_scope.cancel()
        with trio.fail_after(SECONDS):
            async with stream:
                try:
                    return bytes(await stream.receive_some())
                except trio.BrokenResourceError:
                    return b""

    assert http_server.run(main) == b""
    assert [site.told.get(timeout=SECONDS) for _ in range(2)] == ["waits", "cancelled"]


def test_what_the_main_task_returns_or_raises_comes_out() -> None:
    async def returns(value: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return value

    async def fails() -> None:
        await trio.lowlevel.checkpoint()
        raise KeyError("gone")

    assert http_server.run(returns, 7) == 7
    with pytest.raises(KeyError, match="gone"):
        http_server.run(fails)
