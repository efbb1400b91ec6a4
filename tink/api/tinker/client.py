"""What a client asks before and beside its work: configuration, capabilities, telemetry."""

from __future__ import annotations

from typing import Any

from tink import limits
from tink.api.call import Call, Table, identifier
from tink.domain import messages
from tink.domain.requests import Request

# Every flag at the value that this server can honour, said aloud: an SDK may change its defaults.
CONFIG = {
    "pjwt_auth_enabled": False,
    "credential_default_source": "api_key",
    "parallel_fwdbwd_chunks": True,
    "proto_compress_fwdbwd": False,
    "sample_use_retrieve_futures": False,
    "sample_join_sampling_session": False,
    "custom_loss_server_side": False,
    "use_pyqwest_transport": True,
}
DYNAMIC_CONFIG = {
    "refresh_interval_sec": 300,
    "sample_cancel_enabled": True,
    "sample_cancel_max_batch_size": 64,
}


class ClientConfig(Request, frozen=True):
    sdk_version: str = ""


class TelemetryEvent(Request, frozen=True):
    event: str
    error_type: str = "unknown"


class Telemetry(Request, frozen=True):
    events: list[TelemetryEvent]
    session_id: str | None = None


async def config(call: Call) -> dict[str, Any]:
    await call.json(ClientConfig)
    return CONFIG


async def dynamic_config(call: Call) -> dict[str, Any]:
    await call.json(ClientConfig)
    return DYNAMIC_CONFIG


async def capabilities(call: Call) -> dict[str, Any]:
    answer: messages.Capabilities = await call.ask(messages.GetCapabilities(tenant=call.tenant))
    return {
        "supported_models": [
            {
                "model_name": model.name,
                "max_context_length": model.max_context,
                "trainable": model.trainable,
                "sampleable": model.sampleable,
            }
            for model in answer.models
        ]
    }


async def telemetry(call: Call) -> dict[str, Any]:
    """Only that a client died, and of what type of error, is kept: the rest is its user's text."""
    batch = await call.json(Telemetry)
    session_id = batch.session_id
    if session_id is not None:
        # The SDK's name for "before there was one".
        session_id = None if session_id.startswith("sessionless-") else identifier(session_id)
    failures = [event.error_type for event in batch.events if event.event == "UNHANDLED_EXCEPTION"]
    for exception_type in failures[: limits.MAX_CLIENT_FAILURES]:
        await call.ask(
            messages.ReportClientFailure(
                tenant=call.tenant, exception_type=exception_type[:200], session_id=session_id
            )
        )
    return {"status": "accepted"}


TABLE: Table = {
    "/client/config": {"POST": config},
    "/client/dynamic_config": {"POST": dynamic_config},
    "/get_server_capabilities": {"GET": capabilities},
    "/telemetry": {"POST": telemetry},
}
