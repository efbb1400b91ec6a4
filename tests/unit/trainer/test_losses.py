"""Losses against their closed-form gradients, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from tink.errors import UserError
from tink.trainer import losses

POLICY = ["importance_sampling", "ppo", "cispo", "dro", "gspo"]
CONFIGS = {
    "ppo": [{}, {"clip_low_threshold": 0.95, "clip_high_threshold": 1.05}],
    "cispo": [{}, {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}],
    "dro": [{}, {"beta": 0.3}],
    "gspo": [{}, {"clip_low_threshold": 0.5, "clip_high_threshold": 1.5}],
}


def draw(shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    normal = lambda: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    lp = normal().abs().neg()
    return lp, {"weights": normal(), "advantages": normal(), "logprobs": lp + 0.3 * normal()}


def coefficient(name: str, lp: torch.Tensor, x: dict[str, torch.Tensor], config: dict[str, float]):
    """dL/dlp, worked out by hand."""
    if name == "cross_entropy":
        return -x["weights"]
    q, a = x["logprobs"], x["advantages"]
    if name == "dro":
        return -a + config["beta"] * (lp - q)
    ratio = torch.exp(lp - q)
    if name == "importance_sampling":
        return -ratio * a
    low, high = config["clip_low_threshold"], config["clip_high_threshold"]
    if name == "cispo":
        return -ratio.clamp(low, high) * a
    if name == "gspo":
        mask = x.get("sequence_ratio_mask", torch.ones_like(lp)) != 0
        ratio = torch.exp((lp - q)[mask].mean()).expand_as(lp)
    dead = ((a > 0) & (ratio > high)) | ((a < 0) & (ratio < low))
    return torch.where(dead, 0.0, -ratio * a)


@pytest.mark.parametrize(
    ("name", "config"),
    [(n, c) for n in ["cross_entropy", *POLICY] for c in CONFIGS.get(n, [{}])],
)
def test_gradient_is_the_closed_form(name: str, config: dict[str, float]) -> None:
    loss, settled = losses.find(name, config)
    lp, x = draw((200, 3) if loss.wide else (600,))
    lp.requires_grad_()
    loss.function(lp, x, settled).backward()
    torch.testing.assert_close(lp.grad, coefficient(name, lp.detach(), x, settled), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", POLICY)
def test_on_policy_the_gradient_is_minus_the_advantage(name: str) -> None:
    lp, x = draw((50,))
    x["logprobs"] = lp.clone()
    loss, settled = losses.find(name, {})
    lp.requires_grad_()
    loss.function(lp, x, settled).backward()
    torch.testing.assert_close(lp.grad, -x["advantages"])


@pytest.mark.parametrize("name", ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"])
def test_losses_are_sums_over_tokens(name: str) -> None:
    """So that chunks of a request add up."""
    lp, x = draw((60,))
    loss, settled = losses.find(name, {})
    parts = [
        loss.function(lp[part], {name: value[part] for name, value in x.items()}, settled)
        for part in (slice(0, 20), slice(20, 60))
    ]
    torch.testing.assert_close(sum(parts), loss.function(lp, x, settled))


def test_a_custom_loss_goes_through_cross_entropy() -> None:
    """forward_backward_custom sends w = -dC/dlp."""
    lp, _ = draw((30,))
    lp.requires_grad_()
    (lp**2).sum().backward()
    custom = lp.grad.clone()
    lp.grad = None
    loss, settled = losses.find("cross_entropy", {})
    loss.function(lp, {"weights": -custom}, settled).backward()
    torch.testing.assert_close(lp.grad, custom)


def test_gspo_takes_its_ratio_from_the_masked_tokens_only() -> None:
    lp, x = draw((40,))
    x["sequence_ratio_mask"] = (torch.arange(40) % 2).double()
    loss, settled = losses.find("gspo", CONFIGS["gspo"][1])
    lp.requires_grad_()
    loss.function(lp, x, settled).backward()
    torch.testing.assert_close(lp.grad, coefficient("gspo", lp.detach(), x, settled))
    x["sequence_ratio_mask"] = torch.zeros(40, dtype=torch.float64)
    assert torch.isfinite(loss.function(lp, x, settled))


def test_thresholds_per_token_take_the_place_of_the_configured_ones() -> None:
    lp, x = draw((50,))
    loss, settled = losses.find("ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1})
    expected = loss.function(lp, x, settled)
    per_token = x | {
        "clip_low_threshold": torch.full_like(lp, 0.9),
        "clip_high_threshold": torch.full_like(lp, 1.1),
    }
    torch.testing.assert_close(loss.function(lp, per_token, losses.find("ppo", {})[1]), expected)


@pytest.mark.parametrize(
    ("name", "config", "says"),
    [
        ("huber", {}, "cross_entropy, importance_sampling"),
        ("stable_reinforce", {}, "not supported"),
        ("custom", {"loss_id": "x"}, "forward_backward_custom"),
        ("cross_entropy", {"beta": 1.0}, "no loss_fn_config"),
        ("ppo", {"epsilon": 0.2}, "clip_low_threshold, clip_high_threshold"),
        ("dro", {"beta": "0.1"}, "not text"),
        ("dro", {"beta": float("nan")}, "finite"),
        ("ppo", {"clip_low_threshold": 2.0}, "above"),
    ],
)
def test_a_wrong_loss_is_told_what_is_allowed(name: str, config: dict[str, float], says: str) -> None:
    with pytest.raises(UserError, match=says):
        losses.find(name, config)


def test_documented_defaults() -> None:
    assert losses.find("ppo", {})[1] == {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    assert losses.find("cispo", {})[1] == {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}
    assert losses.find("gspo", {})[1] == {
        "clip_low_threshold": 1 - 3e-4,
        "clip_high_threshold": 1 + 4e-4,
    }
    for name, threshold in itertools.product(["ppo", "cispo", "gspo"], losses.THRESHOLDS):
        assert threshold in (losses.__doc__ or ""), (name, threshold)
