"""A TCP proxy before several workers, as a small load balancer would be: it asks each for its health, sends
what comes to the first that is well, and cuts off who was connected to one that is not any more.

    with Balancer([server.url, other.url]) as balancer:
        ...                     # clients use balancer.url
"""

from __future__ import annotations

import threading
from types import TracebackType
from urllib.parse import urlsplit

import httpx
import trio

LOOK_SECONDS, HEALTH_SECONDS = 0.2, 1.0


class Balancer:
    """Serves from a thread of its own. `urls` may change while it runs."""

    def __init__(self, urls: list[str]) -> None:
        self.urls = urls
        self.url = ""
        self._up = threading.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()
        self._well: str | None = None
        self._changed = trio.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._run,), daemon=True)

    def __enter__(self) -> Balancer:
        self._thread.start()
        assert self._up.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._token is not None
        trio.from_thread.run_sync(self._scope.cancel, trio_token=self._token)
        self._thread.join(10)

    async def _run(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._look)
                self._up.set()
                await trio.serve_listeners(self._serve, [listener], handler_nursery=nursery)

    async def _look(self) -> None:
        async with httpx.AsyncClient(timeout=HEALTH_SECONDS) as client:
            while True:
                well = None
                for url in self.urls:
                    try:
                        if (await client.get(f"{url}/healthz")).is_success:
                            well = url
                            break
                    except httpx.TransportError:
                        continue
                if well != self._well:
                    self._well = well
                    self._changed.set()
                    self._changed = trio.Event()
                await trio.sleep(LOOK_SECONDS)

    async def _serve(self, client: trio.SocketStream) -> None:
        well, changed = self._well, self._changed
        async with client:
            if well is None:
                return
            place = urlsplit(well)
            try:
                server = await trio.open_tcp_stream(str(place.hostname), place.port or 80)
            except OSError:
                return
            async with server, trio.open_nursery() as nursery:
                nursery.start_soon(self._copy, client, server, nursery.cancel_scope)
                nursery.start_soon(self._copy, server, client, nursery.cancel_scope)
                await changed.wait()
                nursery.cancel_scope.cancel()

    async def _copy(
        self, source: trio.SocketStream, target: trio.SocketStream, scope: trio.CancelScope
    ) -> None:
        try:
            async for data in source:
                await target.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        scope.cancel()
