"""How an error is answered: `{"detail": text}`, which the SDK shows to its user."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tink.errors import TinkError, Unauthorized

# The SDK waits so long before it sends again what could not be taken.
RETRY_AFTER = {"Retry-After": "1"}


class JSON(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


def refusal(error: TinkError | HTTPException) -> Response:
    if isinstance(error, HTTPException):
        return JSON({"detail": error.detail}, error.status_code, error.headers)
    headers = None
    if error.status in (429, 503):
        headers = RETRY_AFTER
    elif isinstance(error, Unauthorized):
        headers = {"WWW-Authenticate": "Bearer"}
    return JSON({"detail": str(error)}, error.status, headers)


def internal_error(request_id: str) -> Response:
    """For a bug of ours: the log line with the same id has what happened."""
    return JSON({"detail": f"internal error; the server's log has it under request {request_id}"}, 500)
