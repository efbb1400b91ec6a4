"""The losses of the Tinker API, over log-probabilities.

`lp` is log p(target) under the current weights (temperature 1, whole vocabulary), `q` the input
`logprobs`, `A` the `advantages`, `w` the `weights`, and r = exp(lp - q). Every loss is a plain sum
over the tokens of a datum, and a request's loss the sum over its data: a mean anywhere would break
the SDK, which splits a large call into chunks and adds their results.

| loss_fn | loss | loss_fn_config |
|---|---|---|
| cross_entropy | -Σ w·lp | none; weights of any sign |
| importance_sampling | -Σ r·A | none |
| ppo | -Σ min(r·A, clamp(r, lo, hi)·A) | clip_low_threshold 0.8, clip_high_threshold 1.2 |
| cispo | -Σ sg(clamp(r, lo, hi))·lp·A | clip_low_threshold 0.0, clip_high_threshold 4.0 |
| dro | -Σ (lp·A - ½·beta·(lp - q)²) | beta 0.05 |
| gspo | ppo's, with r = sg(s)·exp(lp - sg(lp)) | clip_low_threshold 1-3e-4, clip_high_threshold 1+4e-4 |

In gspo s = exp(mean(lp - q)), over the tokens whose `sequence_ratio_mask`, if there is one, is not 0.

Thresholds bound the ratio itself; they are not distances from 1. A threshold that is given per token,
among the loss_fn_inputs, takes the place of the configured one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tink.errors import UserError

Tensor = Any
Inputs = Mapping[str, Tensor]
Config = Mapping[str, float]

THRESHOLDS = ("clip_low_threshold", "clip_high_threshold")


@dataclass(frozen=True)
class Loss:
    """`function(lp, inputs, config)` is a scalar. `required` and `optional` are loss_fn_inputs beside
    target_tokens, each in its shape; `wide` says whether that may be (N, K) rather than (N,)."""

    function: Callable[[Tensor, Inputs, Config], Tensor]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    defaults: Mapping[str, float] | None = None
    wide: bool = False


def cross_entropy(lp: Tensor, x: Inputs, config: Config) -> Tensor:
    return -(x["weights"] * lp).sum()


def importance_sampling(lp: Tensor, x: Inputs, config: Config) -> Tensor:
    return -(torch.exp(lp - x["logprobs"]) * x["advantages"]).sum()


def ppo(lp: Tensor, x: Inputs, config: Config) -> Tensor:
    return _clipped(torch.exp(lp - x["logprobs"]), x, config)


def cispo(lp: Tensor, x: Inputs, config: Config) -> Tensor:
    ratio = torch.exp(lp.detach() - x["logprobs"])
    return -(_clamp(ratio, x, config) * lp * x["advantages"]).sum()


def dro(lp: Tensor, x: Inputs, config: Config) -> Tensor:
    penalty = 0.5 * config["beta"] * (lp - x["logprobs"]) ** 2
    return -(lp * x["advantages"] - penalty).sum()


def gspo(lp: Tensor, x: Inputs, config: Config) -> Tensor:
    """The ratio of the whole sequence, whose gradient is spread over its tokens."""
    frozen = lp.detach()
    difference = frozen - x["logprobs"]
    if "sequence_ratio_mask" in x:
        difference = difference[x["sequence_ratio_mask"] != 0]
    # With every token masked the sequence has no ratio: exp(0), rather than 0/0.
    mean = difference.sum() / max(difference.numel(), 1)
    return _clipped(torch.exp(mean) * torch.exp(lp - frozen), x, config)


def _clipped(ratio: Tensor, x: Inputs, config: Config) -> Tensor:
    advantages = x["advantages"]
    return -torch.minimum(ratio * advantages, _clamp(ratio, x, config) * advantages).sum()


def _clamp(ratio: Tensor, x: Inputs, config: Config) -> Tensor:
    low, high = (x[name] if name in x else torch.full_like(ratio, config[name]) for name in THRESHOLDS)
    return torch.minimum(torch.maximum(ratio, low), high)


_POLICY = ("logprobs", "advantages")

LOSSES: Mapping[str, Loss] = {
    "cross_entropy": Loss(cross_entropy, ("weights",), wide=True),
    "importance_sampling": Loss(importance_sampling, _POLICY, wide=True),
    "ppo": Loss(ppo, _POLICY, THRESHOLDS, {THRESHOLDS[0]: 0.8, THRESHOLDS[1]: 1.2}),
    "cispo": Loss(cispo, _POLICY, THRESHOLDS, {THRESHOLDS[0]: 0.0, THRESHOLDS[1]: 4.0}),
    "dro": Loss(dro, _POLICY, defaults={"beta": 0.05}),
    "gspo": Loss(
        gspo,
        _POLICY,
        (*THRESHOLDS, "sequence_ratio_mask"),
        {THRESHOLDS[0]: 1 - 3e-4, THRESHOLDS[1]: 1 + 4e-4},
    ),
}

# What a caller may meet in the SDK and not here, with the reason.
REFUSED = {
    "stable_reinforce": "it needs stability records of sampled sequences, which this server lacks",
    "custom": "loss graphs are not run on the server; use forward_backward_custom with a callable",
}


def find(name: str, config: Mapping[str, float | str]) -> tuple[Loss, dict[str, float]]:
    """The loss of that name and its whole configuration. UserError names what is allowed."""
    if name in REFUSED:
        raise UserError(f"loss_fn {name!r} is not supported: {REFUSED[name]}")
    loss = LOSSES.get(name)
    if loss is None:
        raise UserError(f"unknown loss_fn {name!r}; this server has {', '.join(LOSSES)}")
    settled = dict(loss.defaults or {})
    allowed = f"{name} takes {', '.join(settled) or 'no loss_fn_config'}"
    for key, value in config.items():
        if key not in settled:
            raise UserError(f"unknown loss_fn_config {key!r}: {allowed}")
        if isinstance(value, str):
            raise UserError(f"loss_fn_config {key!r} must be a number, not text: {allowed}")
        if not abs(value) < float("inf"):
            raise UserError(f"loss_fn_config {key!r} is {value}: it must be finite")
        settled[key] = float(value)
    low, high = (settled.get(threshold, 0.0) for threshold in THRESHOLDS)
    if low > high:
        raise UserError(f"clip_low_threshold {low} is above clip_high_threshold {high}")
    return loss, settled
