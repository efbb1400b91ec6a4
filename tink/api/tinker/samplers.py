"""Samplers ("sampling sessions"): what samples are drawn from."""

from __future__ import annotations

from typing import Any

from tink.api.call import Call, Table, identifier, natural
from tink.domain import messages, rows
from tink.domain.requests import Request


class CreateSampler(Request, frozen=True):
    session_id: str
    sampling_session_seq_id: int
    base_model: str | None = None
    model_path: str | None = None


async def create(call: Call) -> dict[str, Any]:
    sent = await call.json(CreateSampler)
    created: messages.Created = await call.ask(
        messages.CreateSampler(
            tenant=call.tenant,
            session_id=identifier(sent.session_id),
            sampling_seq_id=natural("sampling_session_seq_id", sent.sampling_session_seq_id),
            base_model=sent.base_model,
            model_path=sent.model_path,
        )
    )
    return {"type": "create_sampling_session", "sampling_session_id": created.id}


async def show(call: Call) -> dict[str, Any]:
    row: rows.Sampler = await call.ask(
        messages.GetSampler(tenant=call.tenant, sampler_id=call.id("sampler_id"))
    )
    return {"sampler_id": row.sampler_id, "base_model": row.base_model, "model_path": row.model_path}


TABLE: Table = {
    "/create_sampling_session": {"POST": create},
    "/samplers/{sampler_id}": {"GET": show},
}
