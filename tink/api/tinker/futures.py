"""Promises: what became of a job."""

from __future__ import annotations

from typing import Any

import trio
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from tink.api.call import MEDIA_PROTOBUF, Call, Table, identifier
from tink.api.refusals import JSON, RETRY_AFTER
from tink.domain import messages
from tink.domain.requests import Request
from tink.errors import TinkError
from tink.limits import POLL_HOLD


class Future(Request, frozen=True):
    request_id: str


async def retrieve(call: Call) -> Any:
    """Holds the poll for a while before it says "not yet": the SDK asks again at once. A result stays
    where it is, so a reply that is lost on the way can be fetched again."""
    request_id = identifier((await call.json(Future)).request_id)
    outcome = await _watched(call, messages.AwaitOutcome(tenant=call.tenant, job_id=request_id))
    if outcome is None:
        return JSON({"type": "try_again", "request_id": request_id, "queue_state": "active"}, 408)
    if outcome.state == "failed":
        return {"error": outcome.error, "category": outcome.category}
    if outcome.state == "cancelled":
        return {"error": outcome.error or "the job was cancelled", "category": "user"}
    if outcome.body is not None:
        return Response(outcome.body, media_type=MEDIA_PROTOBUF)
    return outcome.result or {}


async def _watched(call: Call, question: messages.AwaitOutcome) -> messages.Outcome | None:
    """The answer, None when it did not come within the hold. Raises ClientDisconnect as soon as the
    poller is gone, so that a wait for nobody holds nothing."""
    outcome: messages.Outcome | None = None
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
        with trio.move_on_after(POLL_HOLD):
            try:
                outcome = await call.ask(question)
            except TinkError as error:
                # Not out of the nursery: that would wrap it in a group.
                refused = error
        nursery.cancel_scope.cancel()

    if refused is not None:
        raise _patient(refused)
    if gone and outcome is None:
        raise ClientDisconnect
    return outcome


def _patient(error: TinkError) -> TinkError | HTTPException:
    """After a 5xx the SDK polls again without a pause; after a 429 with one, for ever."""
    if error.status < 500:
        return error
    return HTTPException(429, str(error), RETRY_AFTER)


async def cancel(call: Call) -> None:
    sent = await call.json(Future)
    await call.ask(messages.CancelJob(tenant=call.tenant, job_id=identifier(sent.request_id)))


TABLE: Table = {
    "/retrieve_future": {"POST": retrieve},
    "/cancel_future": {"POST": cancel},
}
