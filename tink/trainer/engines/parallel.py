"""Tensor parallelism as the adapters and the logits need it: each process (rank) holds a slice of every
large matrix of the base model, and all go through the same collectives in the same order.

Where the base model's own layers communicate, megatron-core does it. These are not its mappings, which lose
the sum of a tensor that is not contiguous, and write into what they are given. A group of one communicates
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from tink.trainer.engines.pipeline import Pipeline

Tensor = Any


@dataclass(frozen=True)
class Ranks:
    """Those that share one model. `group` is torch.distributed's; `rank` this process's place in it."""

    group: Any
    rank: int
    size: int

    @classmethod
    def alone(cls) -> Ranks:
        return cls(None, 0, 1)

    @classmethod
    def of(cls, group: Any) -> Ranks:
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def slice(self, whole: int) -> slice:
        """This rank's share of so many rows or columns."""
        each = whole // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    # -- values -------------------------------------------------------------------------------------

    def sum(self, x: Tensor) -> Tensor:
        """Not to be differentiated. Every rank gets the same bits."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        """Not to be differentiated."""
        return self._reduced(x, dist.ReduceOp.MAX)

    def gather(self, x: Tensor) -> Tensor:
        """Slices along the last dimension, put together. Not to be differentiated."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, -1)

    def _reduced(self, x: Tensor, op: Any) -> Tensor:
        if self.size == 1:
            return x
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, op, group=self.group)
        return out

    # -- differentiable -----------------------------------------------------------------------------

    def summed(self, x: Tensor) -> Tensor:
        """The sum of what the ranks have, each a part. Each part's gradient is the sum's."""
        return x if self.size == 1 else _Summed.apply(x, self)

    def shared(self, x: Tensor) -> Tensor:
        """x, the same on every rank, before each does something else with it: the gradient is the sum."""
        return x if self.size == 1 else _Shared.apply(x, self)

    def once(self, x: Tensor) -> Tensor:
        """x, whose gradient will be the same on every rank: it is the first rank's, and 0 on the others,
        so that the sum over all of them is right. Detaching it there instead would leave them with another
        graph, and a backward pass without the collectives that the first one waits in."""
        return x if self.size == 1 else _Once.apply(x, self)


@dataclass(frozen=True)
class Mesh:
    """The processes of one model. `tensor` are those of one stage, each of which has slices of its layers;
    `all` of them have slices of the vocabulary, so that no stage idles before or behind the layers."""

    all: Ranks
    tensor: Ranks
    pipeline: Pipeline


class _Summed(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        return ranks.sum(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Sequence[Tensor | None]:
        return gradient, None


class _Shared(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Sequence[Tensor | None]:
        return ctx.ranks.sum(gradient), None


class _Once(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Sequence[Tensor | None]:
        return (gradient if ctx.ranks.rank == 0 else torch.zeros_like(gradient)), None
