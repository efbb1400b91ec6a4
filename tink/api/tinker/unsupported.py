"""Routes of the Tinker API that Tink does not have: named, so that the answer can say why."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException

from tink.api.call import Call, Handler, Method, Table

_REASONS: dict[tuple[Method, str], str] = {
    ("POST", "/auth/token"): "keys are used as they are, they are not exchanged for tokens",
    ("GET", "/auth/apikey/me"): "keys are configured where the server is",
    ("DELETE", "/auth/apikey/me"): "keys are configured where the server is",
    (
        "POST",
        "/join_sampling_session",
    ): "the client picks its own numbers (sample_join_sampling_session is off)",
    ("POST", "/retrieve_futures"): "poll each future (sample_use_retrieve_futures is off)",
    ("POST", "/copy_weights"): "publish the checkpoint and load it by its address instead",
    ("POST", "/create_custom_loss"): "custom losses run on the client (custom_loss_server_side is off)",
    ("GET", "/sessions/{session_id}/trace_export"): "use tink's own journal and replay tools",
    ("GET", "/audit"): "the journal is the audit log: query its tables with SQL",
    ("GET", "/billing/usage/events"): "nothing is billed",
    ("GET", "/billing/usage/checkpoints/current"): "nothing is billed",
}


def _refuse(reason: str) -> Handler:
    async def refuse(call: Call) -> Any:
        raise HTTPException(404, f"not supported by Tink: {reason}")

    return refuse


def _table() -> Table:
    table: dict[str, dict[Method, Handler]] = {}
    for (method, path), reason in _REASONS.items():
        table.setdefault(path, {})[method] = _refuse(reason)
    return table


TABLE = _table()
