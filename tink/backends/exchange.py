"""One HTTP exchange with one deadline, read whole. The one place where httpx's errors are translated."""

from __future__ import annotations

from typing import NamedTuple

import httpx
import trio

from tink.limits import CONNECT_SECONDS, MAX_ANSWER

_UNSENT = (httpx.ConnectError, httpx.ConnectTimeout)
# What a call on a kept-alive connection meets that the server has just closed.
_STALE = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)


class NoAnswer(Exception):
    """No connection, a broken one, or no whole answer in time. `sent`: the server may have had the call, so
    that whether it was served is not known. `late`: the time was up."""

    def __init__(self, reason: str, *, sent: bool, late: bool = False) -> None:
        super().__init__(reason)
        self.sent, self.late = sent, late


class Answer(NamedTuple):
    status: int
    content: bytes


async def exchange(
    client: httpx.AsyncClient,
    method: str,
    path: str,
    *,
    seconds: float,
    content: bytes | None = None,
    media_type: str = "application/json",
    again: bool = False,
) -> Answer:
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
                    return Answer(answer.status_code, bytes(received))
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
