"""Pipeline parallelism: each process (rank) has the layers of one stage, and hands the hidden states on to
the one that has the next; the last stage gives what comes out to all.

The backward pass is autograd's on every rank, and its messages meet because it is the same everywhere: it
ends with what is behind the stages, since the outputs leave them together; then it takes the micro-batches
in the reverse order, since of what can be run it takes what was made last. So while one stage has the
gradients of a micro-batch, the one behind it has those of the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

Tensor = Any


@dataclass(frozen=True)
class Pipeline:
    """`stage` of `stages` is this process's; `group` has one process of each stage, in their order."""

    group: Any
    stage: int
    stages: int

    @classmethod
    def of(cls, group: Any) -> Pipeline:
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def share(self, layers: int) -> range:
        """Which of so many layers this stage has. If they cannot be divided evenly, the first stages have
        one more."""
        each, left = divmod(layers, self.stages)
        start = self.stage * each + min(self.stage, left)
        return range(start, start + each + (self.stage < left))

    def through(
        self, layers: Callable[[Tensor], Tensor], inputs: Sequence[Tensor], trained: Tensor | None
    ) -> list[Tensor]:
        """What the layers of all stages make of each input, which may be differentiated. `layers` are this
        stage's, and `trained` is a leaf that they use, if all stages' layers have such leaves. The inputs
        count on the first stage; on the others they say the size. A stage is done with one when the next
        begins with it, and takes another one meanwhile."""
        if self.stages == 1:
            return [layers(x) for x in inputs]
        outputs = [self._sent(layers(self._received(x, trained))) for x in inputs]
        return list(_Shared.apply(self, *outputs))

    def _received(self, x: Tensor, trained: Tensor | None) -> Tensor:
        return x if self.stage == 0 else _Received.apply(self, x, trained)

    def _sent(self, x: Tensor) -> Tensor:
        return x if self.stage == self.stages - 1 else _Sent.apply(self, x)

    # -- messages -----------------------------------------------------------------------------------

    def send(self, x: Tensor, stage: int) -> None:
        dist.send(x.contiguous(), group=self.group, group_dst=stage)

    def receive(self, like: Tensor, stage: int) -> Tensor:
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        dist.recv(out, group=self.group, group_src=stage)
        return out

    def last(self, x: Tensor) -> Tensor:
        """What the last stage has in the place of this."""
        out = x.clone(memory_format=torch.contiguous_format)
        dist.broadcast(out, group=self.group, group_src=self.stages - 1)
        return out


class _Received(torch.autograd.Function):  # type: ignore[misc]
    """The last stage's input has a gradient, and so has each: autograd must come by here to hand it on,
    which it does on its way to what is trained."""

    @staticmethod
    def forward(ctx: Any, pipeline: Pipeline, x: Tensor, trained: Tensor | None) -> Tensor:
        ctx.pipeline = pipeline
        return pipeline.receive(x, pipeline.stage - 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Sequence[Tensor | None]:
        ctx.pipeline.send(gradient, ctx.pipeline.stage - 1)
        return None, None, None


class _Sent(torch.autograd.Function):  # type: ignore[misc]
    """The gradient is the next stage's."""

    @staticmethod
    def forward(ctx: Any, pipeline: Pipeline, x: Tensor) -> Tensor:
        ctx.pipeline = pipeline
        pipeline.send(x, pipeline.stage + 1)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Sequence[Tensor | None]:
        return None, ctx.pipeline.receive(gradient, ctx.pipeline.stage + 1)


class _Shared(torch.autograd.Function):  # type: ignore[misc]
    """The last stage's outputs, on every rank, all of which find the whole gradient: what uses them sums
    it over its slices. On the last stage it goes on from here, on the others it is replaced there."""

    @staticmethod
    def forward(ctx: Any, pipeline: Pipeline, *outputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(pipeline.last(x) for x in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Sequence[Tensor | None]:
        return None, *gradients
