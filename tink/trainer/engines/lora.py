"""LoRA adapters beside frozen linear layers.

Nothing in the base model is replaced: a hook of the base model's on each target layer adds, for the adapter
that is in use in the calling context, `alpha / rank * B (A x)`. Which one that is, a ContextVar says, so
that threads that train or sample different adapters never see each other's.

All of an adapter's numbers lie in one flat float32 vector, in the order of the model's layers, A
before B. The optimizer's moments and the accumulated gradient are vectors of the same layout, and their
arithmetic is a handful of operations whatever the number of layers. What computes is made of the values in
the base's dtype, as the base's layers need it (joints.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from tink.errors import BackendError, UserError
from tink.limits import MAX_RANK
from tink.trainer.engines import drawing
from tink.trainer.engines.joints import Joint
from tink.wire.tink_train import ModelInfo

Tensor = Any
P = ParamSpec("P")
R = TypeVar("R")

ATTENTION = frozenset(("q_proj", "k_proj", "v_proj", "o_proj"))
MLP = frozenset(("gate_proj", "up_proj", "down_proj"))
UNEMBED = frozenset(("lm_head",))
LEAVES = ATTENTION | MLP | UNEMBED


@dataclass(frozen=True)
class Sites:
    """The layers of a base model that an adapter may have. `shapes`: name -> (out_features, in_features),
    in the model's order; `joints` are what this process has of them; `device` and `dtype` are those of
    their weights, and the adapter's products'."""

    shapes: Mapping[str, tuple[int, int]]
    joints: Sequence[Joint]
    device: Any
    dtype: Any


_in_use: ContextVar[Adapter | None] = ContextVar("adapter", default=None)


class Adapter:
    """A and B for every target layer. `values` is the flat float32 vector; leaving it out gives zeros."""

    def __init__(self, info: ModelInfo, sites: Sites, values: Tensor | None = None) -> None:
        self.info = info
        self.scale = info.alpha / info.rank
        self._sites = sites
        self.shapes: dict[str, tuple[int, int]] = {}
        for name in targets(info, sites):
            out_features, in_features = sites.shapes[name]
            self.shapes[f"{name}.lora_A"] = (info.rank, in_features)
            self.shapes[f"{name}.lora_B"] = (out_features, info.rank)
        size = sum(rows * columns for rows, columns in self.shapes.values())
        self.values = torch.zeros(size, device=sites.device) if values is None else values
        assert self.values.shape == (size,)
        # The matrices that compute may be views of the values, which is why these are never written to.
        parts = self.split(self.values.to(sites.dtype))
        self._pairs = {
            joint.name: tuple(part.detach().requires_grad_() for part in joint.pack(_pairs(joint, parts)))
            for joint in self._joints
        }

    @property
    def _joints(self) -> list[Joint]:
        """All of a joint's layers are in the adapter, or none."""
        return [joint for joint in self._sites.joints if f"{joint.name}.lora_A" in self.shapes]

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """A flat vector of this layout as named matrices, which share its memory."""
        sizes = [rows * columns for rows, columns in self.shapes.values()]
        return {
            name: piece.view(shape)
            for (name, shape), piece in zip(self.shapes.items(), vector.detach().split(sizes), strict=True)
        }

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The flat vector of named matrices. BackendError when they are not this layout's."""
        wrong = parts.keys() ^ self.shapes.keys() or {
            name for name, part in parts.items() if tuple(part.shape) != self.shapes[name]
        }
        if wrong:
            raise BackendError(f"the tensors do not fit the model: {', '.join(sorted(wrong)[:3])}")
        return torch.cat([parts[name].float().reshape(-1) for name in self.shapes]).to(self.values.device)

    def with_values(self, values: Tensor) -> Adapter:
        return Adapter(self.info, self._sites, values)

    def gradient(self, loss: Tensor) -> Tensor:
        """d loss / d values, flat, float32: this process's part, 0 for what it does not hold. Touches no
        `.grad`, so that it can be thrown away."""
        packed = [part for pair in self._pairs.values() for part in pair]
        found = iter(torch.autograd.grad(loss, packed))
        whole = torch.zeros_like(self.values)
        parts = self.split(whole)
        for joint in self._joints:
            joint.unpack((next(found), next(found)), _pairs(joint, parts))
        return whole

    def pair(self, name: str) -> tuple[Tensor, Tensor] | None:
        """A and B of the joint of that name, as this process has them."""
        return self._pairs.get(name)


def _pairs(joint: Joint, parts: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(parts[f"{name}.lora_A"], parts[f"{name}.lora_B"]) for name in joint.names]


def fresh(info: ModelInfo, sites: Sites) -> Adapter:
    """B = 0, and A uniform in ±1/sqrt(in_features) from a generator that the seed and the layer's name
    start: the same numbers in every engine, whatever the order in which they are drawn."""
    empty = Adapter(info, sites)
    for name, part in empty.split(empty.values).items():
        layer, _, kind = name.rpartition(".")
        if kind == "lora_A":
            # Of a seed torch uses the lower 32 bits alone: this one is a digest of both.
            stream = drawing.generator(info.seed, layer)
            uniform = torch.rand(part.shape, generator=stream) * 2 - 1
            part.copy_(uniform / math.sqrt(part.shape[1]))
    return empty.with_values(empty.values)


def targets(info: ModelInfo, sites: Sites) -> list[str]:
    """The layers that the adapter has, in the model's order."""
    leaves: frozenset[str] = frozenset().union(
        ATTENTION if info.train_attn else (),
        MLP if info.train_mlp else (),
        UNEMBED if info.train_unembed else (),
    )
    return [name for name in sites.shapes if name.rpartition(".")[2] in leaves]


def check(info: ModelInfo, sites: Sites) -> None:
    """UserError for an adapter that cannot be made."""
    if not 1 <= info.rank <= MAX_RANK:
        raise UserError(f"rank {info.rank} is not within 1 to {MAX_RANK}")
    if not 0 < info.alpha < math.inf:
        raise UserError(f"alpha {info.alpha} is not a positive number")
    if not targets(info, sites):
        raise UserError("nothing to train: set train_attn, train_mlp or train_unembed")


@contextmanager
def using(adapter: Adapter | None) -> Iterator[None]:
    """Within it, calls of the base model are calls of the base model with this adapter."""
    token = _in_use.set(adapter)
    try:
        yield
    finally:
        _in_use.reset(token)


def pair_in_use(joint: str) -> tuple[Tensor, Tensor, float] | None:
    """A, B and their scale beside the joint of that name; None if no adapter is in use, or one that has
    nothing there."""
    adapter = _in_use.get()
    pair = adapter.pair(joint) if adapter is not None else None
    return None if adapter is None or pair is None else (*pair, adapter.scale)


def add(output: Tensor, inner: Tensor, b: Tensor, scale: float) -> Tensor:
    """output (..., out_features) + scale * inner (..., rank) @ b.T"""
    return torch.addmm(output.flatten(0, -2), inner.flatten(0, -2), b.T, alpha=scale).view_as(output)


def add_(output: Tensor, inner: Tensor, b: Tensor, scale: float) -> Tensor:
    """The same, written into the output, which nobody else holds, and which is no view."""
    added: Tensor = _Added.apply(output, inner, b, scale)
    return added


class _Added(torch.autograd.Function):  # type: ignore[misc]
    """torch's own way back from a sum that was written into a view copies the gradient three times."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, inner: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(inner, b)
        ctx.mark_dirty(output)
        output.view(-1, len(b)).addmm_(inner.flatten(0, -2), b.T, alpha=scale)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inner, b = ctx.saved_tensors
        to_inner = to_b = None
        flat = gradient.reshape(-1, len(b))
        if ctx.needs_input_grad[1]:
            to_inner = _times(flat @ b, ctx.scale).view_as(inner)
        if ctx.needs_input_grad[2]:
            to_b = _times(flat.T @ inner.flatten(0, -2), ctx.scale)
        return gradient, to_inner, to_b, None


def _times(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x.mul_(scale)


def bound(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with the adapter that is in use now whenever it is called: the backward pass may call
    it again, and in another thread."""
    adapter = _in_use.get()

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with using(adapter):
            return function(*args, **kwargs)

    return call
