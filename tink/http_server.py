"""The HTTP server: uvicorn, before an application that runs on Trio.

uvicorn is the fastest maintained server that Python has, and knows asyncio alone. So Trio is the guest here
of the event loop in which uvicorn runs, in one thread (docs/decisions/0026-uvicorn-before-trio.md): `run`
starts both, and `serve` is to be called inside.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar, cast

import httptools
import outcome
import trio
import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tink.limits import BACKLOG, DRAIN_SECONDS, MAX_HEAD_BYTES

T = TypeVar("T")
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
# An ASGI application.
App = Callable[[Any, Receive, Send], Awaitable[None]]


def run(main: Callable[..., Awaitable[T]], *arguments: object) -> T:
    """As trio.run: what `main` returns or raises."""
    loop = uvloop.new_event_loop()
    try:
        return loop.run_until_complete(_host(main, *arguments)).unwrap()
    finally:
        loop.close()


async def _host(main: Callable[..., Awaitable[T]], *arguments: object) -> outcome.Outcome[T]:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[outcome.Outcome[T]] = loop.create_future()
    trio.lowlevel.start_guest_run(
        main,
        *arguments,
        run_sync_soon_threadsafe=loop.call_soon_threadsafe,
        run_sync_soon_not_threadsafe=loop.call_soon,
        done_callback=ended.set_result,
        host_uses_signal_set_wakeup_fd=True,
    )
    return await ended


async def serve(
    app: App,
    listener: socket.socket,
    *,
    stop: trio.Event,
    idle_seconds: float,
    last_seconds: float,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves, from `task_status.started()` on, until `stop`: then the port is closed first, then those of
    its connections that are idle, and what is in flight gets `last_seconds` to end. One on which the head
    of a request has not come after `idle_seconds` is closed. Owns the socket. Cancelled: cuts all off."""
    async with trio.open_nursery() as requests:
        config = uvicorn.Config(
            _Bridge(app, requests),
            http=_Connection,
            ws="none",
            lifespan="off",
            interface="asgi3",
            proxy_headers=False,
            server_header=False,
            access_log=False,
            log_config=None,
            log_level="critical",  # the application tells what went wrong
            backlog=BACKLOG,
            timeout_keep_alive=cast(int, idle_seconds),
            timeout_graceful_shutdown=cast(int, last_seconds),
        )
        server = _Server(config)
        serving = asyncio.get_running_loop().create_task(server.serve(sockets=[listener]))
        serving.add_done_callback(lambda _: server.listening.set())

        async def await_stop() -> None:
            await stop.wait()
            server.should_exit = True

        try:
            await _awaited(server.listening.wait())
            if not serving.done():
                task_status.started()
                requests.start_soon(await_stop)
            await _awaited(_result(serving))
        finally:
            requests.cancel_scope.cancel()
            if not serving.done():
                server.cut_off()
                with trio.CancelScope(shield=True):
                    await _awaited(_result(serving))


class _Server(uvicorn.Server):
    """Signals are the caller's."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    def cut_off(self) -> None:
        self.should_exit = self.force_exit = True
        for connection in self.server_state.connections:
            connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


class _Connection(HttpToolsProtocol):
    """uvicorn takes a head of any size, and waits for its end for ever; and it closes a connection on a
    sender whom it refuses, who then may not get to read why."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        # Bytes of a head that has begun and not ended, in reads after the one in which it began.
        self._head: int | None = None
        self._waiting: asyncio.TimerHandle | None = None
        self._refused = False
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._waited()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._head is not None:
            self._head += len(data)
            if self._head > MAX_HEAD_BYTES:
                self.send_400_response("The head of the request is too large.")
                return
        super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """What else is sent is read and thrown away for a while, or until the sender closes."""
        self._refused = True
        self._waited()
        head = ["HTTP/1.1 400 Bad Request", "content-type: text/plain", f"content-length: {len(msg)}"]
        self.transport.write("\r\n".join([*head, "connection: close", "", msg]).encode())
        self.transport.write_eof()
        self._waiting = self.loop.call_later(DRAIN_SECONDS, self.transport.close)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head = 0
        self._wait()

    def on_headers_complete(self) -> None:
        self._head = None
        self._waited()
        if self.parser.get_http_version() == "1.1" and all(name != b"host" for name, _ in self.headers):
            raise httptools.HttpParserError("a request of HTTP/1.1 names its host")
        super().on_headers_complete()

    def _wait(self) -> None:
        if self._waiting is None:
            self._waiting = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _waited(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


class _Bridge:
    """The application that uvicorn knows: it has each request answered by the one on Trio, in `nursery`."""

    def __init__(self, app: App, nursery: trio.Nursery) -> None:
        self._app, self._nursery = app, nursery
        self._token = trio.lowlevel.current_trio_token()

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        cancel = trio.CancelScope()

        def begin() -> None:
            self._nursery.start_soon(self._answer, scope, receive, send, answered, cancel)

        self._token.run_sync_soon(begin)
        try:
            await answered
        finally:
            if not answered.done() or answered.cancelled():  # uvicorn waits no longer
                with contextlib.suppress(trio.RunFinishedError):
                    self._token.run_sync_soon(cancel.cancel)

    async def _answer(
        self,
        scope: Any,
        receive: Receive,
        send: Send,
        answered: asyncio.Future[None],
        cancel: trio.CancelScope,
    ) -> None:
        try:
            with cancel:
                await self._app(
                    scope,
                    lambda: _awaited(cast("Coroutine[Any, Any, Any]", receive())),
                    lambda message: _awaited(cast("Coroutine[Any, Any, None]", send(message))),
                )
        except Exception as error:
            # It is told by the application; the connection is closed.
            if not answered.done():
                answered.set_exception(error)
        finally:
            if not answered.done():
                answered.set_result(None)


async def _awaited(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine of the host's gives, stepped by a task of Trio. Cancelled: it is closed."""
    try:
        while True:
            await trio.lowlevel.checkpoint_if_cancelled()
            try:
                future = coroutine.send(None)
            except StopIteration as ended:
                return cast(T, ended.value)
            if future is None:  # asyncio.sleep(0)
                await trio.lowlevel.cancel_shielded_checkpoint()
            else:
                await _done(future)
    finally:
        coroutine.close()


async def _result(future: asyncio.Future[T]) -> T:
    return await future


async def _done(future: asyncio.Future[Any]) -> None:
    # To be cleared by whoever steps a coroutine that awaits a future: it is asyncio's sign of that.
    future._asyncio_future_blocking = False
    task, token = trio.lowlevel.current_task(), trio.lowlevel.current_trio_token()
    waits = True

    def wake() -> None:
        nonlocal waits
        if waits:
            waits = False
            trio.lowlevel.reschedule(task)

    def abort(_: object) -> trio.lowlevel.Abort:
        nonlocal waits
        waits = False
        return trio.lowlevel.Abort.SUCCEEDED

    future.add_done_callback(lambda _: token.run_sync_soon(wake))
    await trio.lowlevel.wait_task_rescheduled(abort)
