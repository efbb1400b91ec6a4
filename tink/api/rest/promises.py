"""The two forms of an operation: one that waits for its result, and one that promises it."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from tink.api.call import Call, Handler
from tink.api.rest import answers, results
from tink.domain import keys
from tink.errors import MalformedRequest
from tink.limits import MAX_NAME


class Submitted(NamedTuple):
    """The jobs of one request; a sample has one for each prompt."""

    jobs: list[str]
    model_id: str | None = None


Submit = Callable[[Call], Awaitable[Submitted]]


def sync(submit: Submit) -> Handler:
    """Holds the call for as long as it takes. Who hangs up before that loses the answer, not the job."""

    async def run(call: Call) -> Any:
        return await results.of(call, (await submit(call)).jobs, math.inf)

    return run


def later(submit: Submit) -> Handler:
    async def run(call: Call) -> Any:
        sent = await submit(call)
        return answers.Promise(results.SEPARATOR.join(sent.jobs), sent.model_id)

    return run


def key_of(call: Call) -> str | None:
    """What a repeat is known by, if the client said so."""
    key = call.request.headers.get("idempotency-key")
    if key is None:
        return None
    if not (0 < len(key) <= MAX_NAME and key.isascii() and key.isprintable()):
        raise MalformedRequest(f"an Idempotency-Key has 1 to {MAX_NAME} printable ASCII characters")
    return keys.client(key)
