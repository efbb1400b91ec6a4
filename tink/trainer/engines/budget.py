"""How many tokens go through the model at once while training.

It decides how a batch is cut, and so the last bits of its gradient: a number that hangs on the machine's
kind, and not on what else is in its memory.
"""

from __future__ import annotations

import torch

from tink.limits import (
    ACTIVATION_SHARE,
    MAX_MICRO_BATCH_TOKENS,
    MICRO_BATCH_TOKENS,
    MIN_MICRO_BATCH_TOKENS,
    PROBE_TOKENS,
)
from tink.trainer.engines import lora
from tink.trainer.engines.base_model import BaseModel
from tink.wire.tink_train import ModelInfo


def micro_batch_tokens(base: BaseModel) -> int:
    """On a GPU a power of two, whose activations take ACTIVATION_SHARE of what the weights leave, or less.
    Every rank calls this, and gets the least of all."""
    if base.device.type == "cpu":
        return MICRO_BATCH_TOKENS
    room = torch.cuda.get_device_properties(base.device).total_memory - torch.cuda.memory_allocated()
    fitting = int(room * ACTIVATION_SHARE / (_bytes_per_token(base) * base.in_flight))
    fitting = min(max(fitting, MIN_MICRO_BATCH_TOKENS), MAX_MICRO_BATCH_TOKENS)
    tokens = 1 << (fitting.bit_length() - 1)
    return -int(base.head.ranks.max(torch.tensor(-tokens, device=base.device)))


def _bytes_per_token(base: BaseModel) -> float:
    """What the backward pass needs to have kept, of one token."""
    info = ModelInfo(rank=32, alpha=32.0, seed=0, train_attn=True, train_mlp=True, train_unembed=False)
    adapter = lora.fresh(info, base.sites)
    ids = torch.zeros((1, PROBE_TOKENS), dtype=torch.int64, device=base.device)
    before = torch.cuda.memory_allocated()
    with lora.using(adapter):
        hidden = base.hidden(ids)
    kept: int = torch.cuda.memory_allocated() - before
    del hidden
    return max(kept / PROBE_TOKENS, 1.0)
