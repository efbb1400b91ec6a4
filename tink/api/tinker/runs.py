"""Training runs: a run is a model, by the name that people list it under."""

from __future__ import annotations

from typing import Any

from tink.api.call import Call, Table, identifier
from tink.api.tinker.views import checkpoint, training_run
from tink.domain import messages, rows
from tink.domain.requests import Request


class GetInfo(Request, frozen=True):
    model_id: str


async def info(call: Call) -> dict[str, Any]:
    sent = await call.json(GetInfo)
    view: messages.ModelView = await call.ask(
        messages.GetModel(tenant=call.tenant, model_id=identifier(sent.model_id))
    )
    return {
        "type": "get_info",
        "model_id": view.row.model_id,
        "model_name": view.row.base_model,
        "model_data": {
            "arch": view.arch,
            "model_name": view.row.base_model,
            "tokenizer_id": view.tokenizer,
        },
        "is_lora": True,
        "lora_rank": view.row.rank,
        "optimizer_config": {"type": "adamw"},
    }


async def index(call: Call) -> dict[str, Any]:
    call.check_scope()
    page = call.page(20)
    found: list[messages.ModelView] = await call.ask(
        messages.ListModels(tenant=call.tenant, project_id=call.request.query_params.get("project_id"))
    )
    return {
        "training_runs": [training_run(view) for view in page.of(found)],
        "cursor": page.cursor(found),
    }


async def show(call: Call) -> dict[str, Any]:
    call.check_scope()
    view: messages.ModelView = await call.ask(
        messages.GetModel(tenant=call.tenant, model_id=call.id("run_id"))
    )
    return training_run(view)


async def saved(call: Call) -> dict[str, Any]:
    found: list[rows.Checkpoint] = await call.ask(
        messages.ListCheckpoints(tenant=call.tenant, model_id=call.id("run_id"))
    )
    return {"checkpoints": [checkpoint(row) for row in found], "cursor": None}


TABLE: Table = {
    "/get_info": {"POST": info},
    "/training_runs": {"GET": index},
    "/training_runs/{run_id}": {"GET": show},
    "/training_runs/{run_id}/checkpoints": {"GET": saved},
}
