"""AdamW with hyper-parameters that come with every step, as the Tinker API has it.

    m = β1 m + (1-β1) g        p = p (1 - lr wd)
    v = β2 v + (1-β2) g²       p = p - lr (m / (1-β1^t)) / (sqrt(v / (1-β2^t)) + eps)

The same as torch.optim.AdamW, but a function of its arguments: a step that fails half-way has changed
nothing. Everything is float32, because eps 1e-12 vanishes in anything shorter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from tink import crash
from tink.errors import UserError
from tink.wire.tink_train import OptimStep

Tensor = Any


@dataclass(frozen=True)
class Moments:
    """`step` t counts the steps of this model alone; m and v are flat, like its parameters."""

    step: int
    m: Tensor
    v: Tensor

    @classmethod
    def zero(cls, like: Tensor) -> Moments:
        return cls(0, torch.zeros_like(like), torch.zeros_like(like))


def check(op: OptimStep) -> None:
    """UserError for hyper-parameters that would ruin the weights."""
    for name in ("learning_rate", "eps", "weight_decay", "grad_clip_norm"):
        value = getattr(op, name)
        if not 0 <= value < math.inf:
            raise UserError(f"{name} is {value}: it must be a finite number, 0 or more")
    for name in ("beta1", "beta2"):
        value = getattr(op, name)
        if not 0 <= value < 1:
            raise UserError(f"{name} is {value}: it must be within 0 (included) and 1")


def step(p: Tensor, g: Tensor, moments: Moments, op: OptimStep) -> tuple[Tensor, Moments, float]:
    """New parameters, new moments, and the norm of the gradient before clipping."""
    norm = float(torch.linalg.vector_norm(g.double()))
    if op.grad_clip_norm and norm > op.grad_clip_norm:
        g = g * (op.grad_clip_norm / (norm + 1e-6))
    t = moments.step + 1
    m = moments.m * op.beta1 + g * (1 - op.beta1)
    v = moments.v * op.beta2 + g * g * (1 - op.beta2)
    crash.point("trainer.moments")
    denominator = (v / (1 - op.beta2**t)).sqrt_().add_(op.eps)
    update = (m / (1 - op.beta1**t)).div_(denominator)
    # 0/0 where nothing was ever accumulated and eps is 0: no gradient, no update.
    update = torch.where(m == 0, torch.zeros_like(update), update) if op.eps == 0 else update
    new = p * (1 - op.learning_rate * op.weight_decay) - op.learning_rate * update
    return new, Moments(t, m, v), norm
