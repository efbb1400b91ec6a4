"""Rows as the SDK reads them. Its models are strict: what it wants as a string must be one."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from tink.domain import messages, rows

_TYPES = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}


def moment(seconds: float) -> datetime:
    """In JSON: RFC 3339, UTC."""
    return datetime.fromtimestamp(seconds, UTC)


def strings(metadata: Mapping[str, Any]) -> dict[str, str]:
    """What is not a string becomes its JSON."""
    return {
        key: value if isinstance(value, str) else msgspec.json.encode(value).decode()
        for key, value in metadata.items()
    }


def checkpoint(row: rows.Checkpoint) -> dict[str, Any]:
    return {
        "checkpoint_id": f"{row.kind}/{row.name}",
        "checkpoint_type": _TYPES[row.kind],
        "time": moment(row.created_at),
        "tinker_path": row.address,
        "size_bytes": row.size_bytes,
        "public": row.public,
        "user_metadata": strings(row.user_metadata),
        "expires_at": None if row.expires_at is None else moment(row.expires_at),
    }


def training_run(view: messages.ModelView) -> dict[str, Any]:
    row = view.row
    return {
        "training_run_id": row.model_id,
        "base_model": row.base_model,
        "model_owner": row.tenant,
        "is_lora": True,
        "lora_rank": row.rank,
        "corrupted": False,
        "last_request_time": moment(row.last_request_at),
        "last_checkpoint": view.last_checkpoint and checkpoint(view.last_checkpoint),
        "last_sampler_checkpoint": view.last_sampler_checkpoint
        and checkpoint(view.last_sampler_checkpoint),
        "user_metadata": strings(row.user_metadata),
    }
