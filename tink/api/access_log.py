"""A request id for every request, and one line for every answer: ids and figures only, never a body,
a key or a query string."""

from __future__ import annotations

import structlog
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tink.api.call import route_of
from tink.world import World

log = structlog.get_logger("tink.api")


class AccessLog:
    """ASGI middleware. A request that got no answer (its client left) has status 0."""

    def __init__(self, app: ASGIApp, world: World) -> None:
        self._app = app
        self._world = world

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = scope["tink.request_id"] = self._world.new_id()
        started = self._world.monotonic()
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            log.debug(
                "request",
                request_id=request_id,
                method=scope["method"],
                route=route_of(scope),
                status=status,
                ms=round(1000 * (self._world.monotonic() - started), 1),
            )
