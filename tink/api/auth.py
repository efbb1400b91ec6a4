"""API keys. A key is random, so its SHA-256 is enough to keep; nothing here can tell what it was."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping

from starlette.datastructures import Headers

from tink.errors import Unauthorized

OPEN_TENANT = "default"

_REFUSAL = "no valid API key: pass one of this server's keys as X-API-Key, or as Authorization: Bearer"


class Auth:
    """Tells the tenant of a request by its key. Without keys the server is open: every request, with
    whatever key, is of one tenant."""

    def __init__(self, keys: Mapping[str, str] | None = None) -> None:
        """`keys`: API key -> tenant."""
        self._tenants = [(_digest(key), tenant) for key, tenant in (keys or {}).items()]

    def tenant(self, headers: Headers) -> str:
        """Raises Unauthorized, in the same words and after the same work whatever is wrong."""
        if not self._tenants:
            return OPEN_TENANT
        presented = _digest(_presented(headers))
        found = None
        for digest, tenant in self._tenants:
            if hmac.compare_digest(digest, presented):
                found = tenant
        if found is None:
            raise Unauthorized(_REFUSAL)
        return found


def _presented(headers: Headers) -> str:
    key = headers.get("x-api-key")
    if key is None:
        scheme, _, rest = headers.get("authorization", "").partition(" ")
        key = rest.strip() if scheme.lower() == "bearer" else ""
    return key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
