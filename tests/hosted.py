"""An application behind the HTTP server of Tink, on a socket of this machine, in a thread: the server needs
an event loop of its own, which tests on Trio do not have."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple

import trio

from tink import http_server
from tink.world import World


class Host(NamedTuple):
    """`end`: tells the server to stop, and does not wait."""

    url: str
    end: Callable[[], None]


Make = Callable[[trio.Nursery], Awaitable[http_server.App]]


@contextmanager
def hosted(make: Make, *, idle_seconds: float = 60.0, last_seconds: float = 1.0) -> Iterator[Host]:
    """`make` is called there, with a nursery that lives as long as the server."""
    began: SimpleQueue[Host | BaseException] = SimpleQueue()

    async def main() -> None:
        stop, token = trio.Event(), trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            app = await make(nursery)
            with World().listen("127.0.0.1", 0) as listener:
                url = f"http://127.0.0.1:{listener.getsockname()[1]}"
                async with trio.open_nursery() as serving:
                    serve = partial(http_server.serve, app, listener, stop=stop)
                    await serving.start(
                        partial(serve, idle_seconds=idle_seconds, last_seconds=last_seconds)
                    )
                    began.put(Host(url, lambda: token.run_sync_soon(stop.set)))
            nursery.cancel_scope.cancel()

    def run() -> None:
        try:
            http_server.run(main)
        except BaseException as error:
            began.put(error)
            raise

    thread = threading.Thread(target=run)
    thread.start()
    try:
        told = began.get()
        if isinstance(told, BaseException):
            raise told
        try:
            yield told
        finally:
            with contextlib.suppress(trio.RunFinishedError):
                told.end()
    finally:
        thread.join()
