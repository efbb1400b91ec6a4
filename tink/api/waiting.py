"""Waiting for a job's end, for as long as there is somebody who waits."""

from __future__ import annotations

import trio
from starlette.requests import ClientDisconnect

from tink.api.call import Call
from tink.domain import messages
from tink.errors import TinkError


async def outcome(call: Call, job_id: str, hold: float) -> messages.Outcome | None:
    """What became of the job, None when that did not come within `hold` seconds. Raises what the worker
    refuses, and ClientDisconnect as soon as the asker is gone, so that a wait for nobody holds nothing."""
    found: messages.Outcome | None = None
    refused: TinkError | None = None
    gone = False

    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            nonlocal gone
            while (await call.request.receive())["type"] != "http.disconnect":
                pass
            gone = True
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        with trio.move_on_after(hold):
            try:
                found = await call.ask(messages.AwaitOutcome(tenant=call.tenant, job_id=job_id))
            except TinkError as error:
                # Not out of the nursery: that would wrap it in a group.
                refused = error
        nursery.cancel_scope.cancel()

    if refused is not None:
        raise refused
    if gone and found is None:
        raise ClientDisconnect
    return found
