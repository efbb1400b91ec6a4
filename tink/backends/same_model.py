"""Whether a vLLM server serves the model that is trained, and the same one as the other servers. It is not
told by names, which are chosen freely: by the model's shape, where its files can be read here, and by what
servers find likely."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import structlog

from tink.backends.replica import Probe, ReplicaRefused, Served
from tink.domain.events import TrainerStarted
from tink.errors import UNREADABLE
from tink.limits import BASE_MODEL_NATS
from tink.world import World

log = structlog.get_logger()

# Of a model's config.json: what no two different architectures have in common.
SHAPE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


async def check_trained(trained: TrainerStarted, served: Served, url: str, world: World) -> None:
    """Raises ReplicaRefused if the server's model is not the one that is trained; warns if that cannot be
    told."""
    mine, theirs = await world.run_sync(lambda: (_shape(trained.base_path), _shape(served.root)))
    if mine is None or theirs is None:
        if not {served.root, served.base_model} & {trained.base_path, trained.base_model}:
            log.warning(
                "vllm server's model cannot be compared",
                url=url,
                serves=f"{served.base_model} ({served.root})",
                trained=f"{trained.base_model} ({trained.base_path})",
            )
        return
    for name in SHAPE:
        if mine.get(name) != theirs.get(name):
            raise ReplicaRefused(
                f"the vLLM server at {url} serves another model than is trained: {name} is "
                f"{theirs.get(name)} in {served.root}, and {mine.get(name)} in {trained.base_path}; start "
                "it with the model that is trained"
            )


def check_alike(served: Served, probe: Probe | None, other: Served, others: Probe | None, url: str) -> None:
    """Raises ReplicaRefused if a server's samples would not be those of another one, at `url`, that serves.
    An old TRL has no probe."""
    remedy = f"is not like the one at {url}: start all of VLLM_BASE_URL with the same model and options"
    if probe is None or others is None:
        if probe is not others:
            raise ReplicaRefused(
                f"one of them is a trl vllm-serve before 1.11, which samples otherwise; it {remedy}"
            )
        return
    if served.max_context != other.max_context:
        raise ReplicaRefused(
            f"its context (--max-model-len) is {served.max_context}, the other's {other.max_context}; it "
            f"{remedy}"
        )
    if probe.mode != others.mode:
        raise ReplicaRefused(
            f"it gives {probe.mode} logprobs (--logprobs-mode), the other {others.mode}; it {remedy}"
        )
    if probe.mode == "processed":
        return  # nothing is told of the model
    common = probe.scores.keys() & others.scores.keys()
    difference = max(
        (abs(probe.scores[token] - others.scores[token]) for token in common), default=math.inf
    )
    if not difference <= BASE_MODEL_NATS:
        raise ReplicaRefused(f"it finds other tokens likely, by {difference:.2g} nats; it {remedy}")


def _shape(directory: str | None) -> dict[str, Any] | None:
    """None if it is not a directory with a model on this machine."""
    if not directory or not Path(directory).is_absolute():
        return None
    try:
        return msgspec.json.decode((Path(directory) / "config.json").read_bytes(), type=dict[str, Any])
    except (OSError, *UNREADABLE):
        return None
