"""Choosing tokens: temperature, top-k, top-p and a stream of random numbers per sample.

The inverse of the cumulative distribution at one uniform number: what a row draws hangs on its logits
and its own stream alone, never on the rows beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

Tensor = Any

# Uniform numbers made at a time, per row.
BLOCK = 128


def generator(seed: int, stream: object) -> Any:
    """A generator of its own for each (seed, stream)."""
    digest = hashlib.sha256(f"{seed}:{stream}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Streams:
    """Uniform numbers for rows that go forward in step: row i has its own stream."""

    def __init__(self, seed: int, rows: Sequence[int]) -> None:
        self._generators = [generator(seed, row) for row in rows]
        self._step = 0
        self._block: Tensor = None

    def next(self) -> Tensor:
        """float64 (rows,), each within [0, 1)."""
        place = self._step % BLOCK
        if place == 0:
            self._block = torch.stack(
                [torch.rand(BLOCK, generator=g, dtype=torch.float64) for g in self._generators]
            )
        self._step += 1
        return self._block[:, place]


def choose(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int = -1, top_p: float = 1.0
) -> Tensor:
    """logits (R, V), uniform (R,) -> token ids (R,). Temperature 0 takes the likeliest token, the
    first of equals; then top_k keeps the k likeliest; then top_p the fewest whose sum reaches p."""
    if temperature == 0:
        return logits.argmax(-1)
    scaled = logits.double()
    scaled = (scaled - scaled.amax(-1, keepdim=True)) / temperature
    if 0 < top_k < scaled.shape[-1]:
        values, ids = scaled.topk(top_k, dim=-1)
        scaled = torch.full_like(scaled, float("-inf")).scatter_(-1, ids, values)
    probabilities = scaled.softmax(-1)
    if top_p < 1:
        ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, ids, ordered)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1]
    # Below the total even after rounding, so that the search ends on a token that has probability.
    point = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point.unsqueeze(-1), right=True).squeeze(-1)
