"""Promises: what became of a job."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from tink.api import waiting
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
    try:
        outcome = await waiting.outcome(call, request_id, POLL_HOLD)
    except TinkError as error:
        raise _patient(error) from None
    if outcome is None:
        return JSON({"type": "try_again", "request_id": request_id, "queue_state": "active"}, 408)
    if outcome.state == "failed":
        return {"error": outcome.error, "category": outcome.category}
    if outcome.state == "cancelled":
        return {"error": outcome.error or "the job was cancelled", "category": "user"}
    if outcome.body is not None:
        return Response(outcome.body, media_type=MEDIA_PROTOBUF)
    return outcome.result or {}


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
