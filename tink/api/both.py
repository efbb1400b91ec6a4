"""Paths that two APIs have: each request goes to the one whose client sent it, by what is in its body."""

from __future__ import annotations

import msgspec

from tink.api.body import Body, expand
from tink.api.call import MEDIA_JSON, Call, Handler, Method, Table
from tink.errors import UNREADABLE, TinkError
from tink.limits import MAX_JSON_BODY

# The SDK counts its jobs, and says with each poll whether it would take less than the whole result.
SDK_MEMBERS = frozenset({"seq_id", "model_seq_id", "sampling_session_id", "allow_metadata_only"})


def together(sdk: Table, rest: Table) -> Table:
    """One table. What both have is POST."""
    shared: dict[str, dict[Method, Handler]] = {
        path: {"POST": _either(sdk[path]["POST"], rest[path]["POST"])} for path in sdk if path in rest
    }
    return {**rest, **sdk, **shared}


def _either(sdk: Handler, rest: Handler) -> Handler:
    """What is not JSON is for the SDK's handler to refuse."""

    async def handle(call: Call) -> object:
        body = await call.body(MEDIA_JSON, MAX_JSON_BODY)
        members = await call.offload(body, _members, body)
        return await (sdk if members is None or members & SDK_MEMBERS else rest)(call)

    return handle


def _members(body: Body) -> set[str] | None:
    try:
        return set(msgspec.json.decode(expand(body, MAX_JSON_BODY), type=dict[str, msgspec.Raw]))
    except (TinkError, *UNREADABLE):
        return None
