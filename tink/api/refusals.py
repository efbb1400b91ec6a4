"""How an error is answered: `{"detail": text}`, which the SDK shows to its user, and a `remedy` where the
text has none."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tink.errors import TinkError, Unauthorized

# The SDK waits so long before it sends again what could not be taken.
RETRY_AFTER = {"Retry-After": "1"}


class Failure(msgspec.Struct, frozen=True, omit_defaults=True):
    """`remedy`: what to do, where `detail` does not say it."""

    detail: str
    remedy: str | None = None


class JSON(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


def refusal(error: TinkError | HTTPException) -> Response:
    if isinstance(error, HTTPException):
        return JSON(Failure(error.detail), error.status_code, error.headers)
    headers = None
    if error.status in (429, 503):
        headers = RETRY_AFTER
    elif isinstance(error, Unauthorized):
        headers = {"WWW-Authenticate": "Bearer"}
    return JSON(Failure(str(error), error.remedy), error.status, headers)


def internal_error(request_id: str) -> Response:
    """For a bug of ours: the log line with the same id has what happened."""
    return JSON(Failure(f"internal error; the server's log has it under request {request_id}"), 500)
