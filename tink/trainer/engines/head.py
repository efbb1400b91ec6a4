"""The output head: logits and log-probabilities over the vocabulary, of which each rank may have a slice.

Logits of a whole batch would be the largest thing in memory by far. They are made so many rows at a time,
and none are kept for the backward pass: for one target at each position and a head that is not trained,

    d log p(t) / d hidden = W[t] - sum over v of p(v) W[v]

is found beside the logits, at the price of the product that the backward pass would need anyway. Else the
backward pass makes them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tink.limits import LOGIT_CELLS
from tink.trainer.engines import lora
from tink.trainer.engines.parallel import Ranks

Tensor = Any

NAME = "lm_head"


@dataclass(frozen=True)
class Head:
    """`weight` (V, H) and `bias` (V) or None: this rank's rows. The hidden states that it takes are the
    same on every rank, and so is what it gives."""

    weight: Tensor
    bias: Tensor | None
    ranks: Ranks

    @property
    def rows(self) -> int:
        """Positions whose logits may be held at once."""
        return max(self._cells // len(self.weight), 1)

    @property
    def _cells(self) -> int:
        return LOGIT_CELLS[self.weight.device.type]

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> float32 (..., V of all ranks). Not to be differentiated where there are several."""
        return self.ranks.gather(self._slice(hidden))

    def logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden (T, H), targets (T, K) -> log p(target), float32 (T, K). K targets of one position share
        its row of logits."""
        if targets.shape[1] == 1 and lora.pair_in_use(NAME) is None:
            return _Frozen.apply(hidden, targets, self)
        pieces = zip(hidden.split(self.rows), targets.split(self.rows), strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([self._score(*piece) for piece in pieces])
        score = lora.bound(self._score)
        return torch.cat(
            [checkpoint(score, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
        )

    def _slice(self, hidden: Tensor) -> Tensor:
        """float32 logits of this rank's part of the vocabulary."""
        # Each rank's part of the gradient, of the head's and of the adapter's A, is summed over the ranks.
        hidden = self.ranks.shared(hidden)
        out = functional.linear(hidden, self.weight, self.bias)
        pair = lora.pair_in_use(NAME)
        if pair is not None:
            a, b, scale = pair
            out = lora.add_(out, hidden @ a.T, b[self.ranks.slice(len(b))], scale)
        return out.float()

    def _score(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return self._summary(self._slice(hidden), targets)[0]

    def _summary(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """log p(target) (T, K), and the logarithm (T, 1) of the sum of exp(logits). What is communicated is
        a few numbers a row, never logits."""
        ranks = self.ranks
        peak = ranks.max(logits.detach().amax(-1, keepdim=True))
        ids, absent = self._local(targets)
        found = logits.gather(-1, ids).masked_fill(absent, 0.0)
        mass = (logits - peak).exp().sum(-1, keepdim=True)
        mass, found = ranks.summed(torch.cat([mass, found], -1)).split([1, targets.shape[-1]], -1)
        total = peak + mass.log()
        return found - total, total

    def _local(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the targets here, and which of them are on another rank."""
        size = len(self.weight)
        ids = targets - self.ranks.rank * size
        absent = (ids < 0) | (ids >= size)
        return ids.masked_fill(absent, 0), absent


class _Frozen(torch.autograd.Function):  # type: ignore[misc]
    """log p(target) of one target at each position, of a head that is not trained."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
        found, slopes = [], []
        for rows, wanted in zip(hidden.split(head.rows), targets.split(head.rows), strict=True):
            logits = head._slice(rows)
            logprobs, total = head._summary(logits, wanted)
            found.append(logprobs)
            if ctx.needs_input_grad[0]:
                less = logits.sub_(total).exp_()
                # p - 1 at the target, while it is in float32: what is left of a likely one would be lost.
                (ids,), (absent,) = (x.T for x in head._local(wanted))
                every = torch.arange(len(less), device=less.device)
                less.index_put_((every, ids), less[every, ids] - (~absent).float())
                slopes.append(less.to(hidden.dtype) @ head.weight)
        if slopes:
            ctx.head = head
            ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Sequence[Tensor | None]:
        (slope,) = ctx.saved_tensors
        return ctx.head.ranks.sum((-gradient * slope).to(slope.dtype)), None, None
