"""One HTTP exchange with one deadline, read whole, and the client that makes it. The one place where
httpx's errors are translated."""

from __future__ import annotations

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


def http_client(url: str, world: World, *, slots: int, token: str = "") -> httpx.AsyncClient:
    """For the exchanges with one server. `slots`: connections, so calls at once; more wait, their deadlines
    running. `token`: what the server wants as bearer. Nothing is read from the environment: a proxy that is
    set there is not for these calls."""
    return httpx.AsyncClient(
        base_url=url,
        transport=world.http_transport(url, slots),
        headers={"Authorization": f"Bearer {token}"} if token else {},
        trust_env=False,
    )


async def exchange(
    client: httpx.AsyncClient,
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
                    async with client.stream(
                        method,
                        path,
                        content=content,
                        headers={"Content-Type": media_type} if content is not None else {},
                        timeout=httpx.Timeout(seconds, connect=CONNECT_SECONDS),
                    ) as answer:
                        async for part in answer.aiter_bytes():
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
