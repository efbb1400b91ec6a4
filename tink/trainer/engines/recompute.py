"""Long sequences: what a layer finds on its way is not kept for the backward pass, it is computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from tink.trainer.engines import lora

_on: ContextVar[bool] = ContextVar("recompute", default=False)


@contextmanager
def within(on: bool) -> Iterator[None]:
    """Whether layers that are called within it do so."""
    token = _on.set(on)
    try:
        yield
    finally:
        _on.reset(token)


def layer(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of a layer, which can do so. It must read nothing that changes but its arguments
    and the adapter in use."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if not (_on.get() and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        bound = lora.bound(forward)
        return checkpoint(bound, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return call
