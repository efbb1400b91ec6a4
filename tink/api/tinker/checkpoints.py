"""Saved weights. All changes are idempotent and answer 204: the SDK takes a 409 for a reason to try
again, for minutes."""

from __future__ import annotations

from typing import Any

import msgspec

from tink.api.call import Call, Table
from tink.api.tinker.views import checkpoint, moment
from tink.domain import messages, rows
from tink.domain.ids import Address
from tink.domain.requests import Request
from tink.errors import MalformedRequest


class WeightsInfo(Request, frozen=True):
    tinker_path: str


class SetTtl(Request, frozen=True):
    ttl_seconds: int | None


class Fork(Request, frozen=True):
    """`messages.ForkCheckpoint` without whose and which."""

    fork_id: str
    op_no: int
    step: int
    edits: list[str] = msgspec.field(default_factory=list)


def _address(call: Call, kind: str | None = None) -> str:
    """The address that the path spells. Raises UserError when that cannot be one."""
    kind = kind or call.path("kind")
    return str(Address.parse(f"tinker://{call.id('run_id')}/{kind}/{call.path('name')}"))


async def index(call: Call) -> dict[str, Any]:
    page = call.page(100)
    found: list[rows.Checkpoint] = await call.ask(messages.ListCheckpoints(tenant=call.tenant))
    return {"checkpoints": [checkpoint(row) for row in page.of(found)], "cursor": page.cursor(found)}


async def delete(call: Call) -> None:
    await call.ask(messages.DeleteCheckpoint(tenant=call.tenant, address=_address(call)))


async def publish(call: Call) -> None:
    await call.ask(messages.ChangeCheckpoint(tenant=call.tenant, address=_address(call), public=True))


async def unpublish(call: Call) -> None:
    await call.ask(messages.ChangeCheckpoint(tenant=call.tenant, address=_address(call), public=False))


async def set_ttl(call: Call) -> None:
    address = _address(call)
    seconds = (await call.json(SetTtl)).ttl_seconds
    if seconds is not None and seconds < 1:
        raise MalformedRequest("ttl_seconds must be positive, or null for no end")
    await call.ask(
        messages.ChangeCheckpoint(tenant=call.tenant, address=address, set_ttl=True, ttl_seconds=seconds)
    )


async def download_urls(call: Call) -> dict[str, Any]:
    view: messages.CheckpointView = await call.ask(
        messages.GetCheckpoint(tenant=call.tenant, address=_address(call, "external_weights"))
    )
    urls = call.service.downloads.urls(str(call.request.base_url), view)
    return {"urls": urls.by_name, "expires": moment(urls.expires)}


async def info(call: Call) -> dict[str, Any]:
    sent = await call.json(WeightsInfo)
    view: messages.CheckpointView = await call.ask(
        messages.GetCheckpoint(tenant=call.tenant, address=str(Address.parse(sent.tinker_path)))
    )
    model = view.model
    return {
        "base_model": model.base_model,
        "is_lora": True,
        "lora_rank": model.rank,
        "train_unembed": model.train_unembed,
        "train_mlp": model.train_mlp,
        "train_attn": model.train_attn,
        "optimizer_config": {"type": "adamw"},
    }


async def fork(call: Call) -> dict[str, Any]:
    """Not of the SDK: `tink replay train --fork` sends it."""
    sent = await call.json(Fork)
    forked: rows.Checkpoint = await call.ask(
        messages.ForkCheckpoint(
            tenant=call.tenant,
            model_id=call.id("run_id"),
            name=call.path("name"),
            **msgspec.structs.asdict(sent),
        )
    )
    return checkpoint(forked)


_ONE = "/training_runs/{run_id}/checkpoints/{kind}/{name}"

TABLE: Table = {
    "/checkpoints": {"GET": index},
    "/weights_info": {"POST": info},
    _ONE: {"DELETE": delete},
    "/training_runs/{run_id}/checkpoints/weights/{name}/fork": {"POST": fork},
    f"{_ONE}/publish": {"POST": publish, "DELETE": unpublish},
    f"{_ONE}/ttl": {"PUT": set_ttl},
    "/training_runs/{run_id}/checkpoints/external_weights/{name}/external_weights_urls": {
        "GET": download_urls
    },
}
