"""How an adapter's matrices lie beside a base model's layers, which may be several of transformers' layers
in one, in slices on several processes, or both.

They are put together once for each set of values and taken apart once for each gradient, which the passes
through the model would else do for each layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Tensor = Any


def _every() -> slice:
    return slice(None)


@dataclass(frozen=True)
class Joint:
    """The layers `names`, of one input, that a base model has as one. Of each B this process has `rows`, of
    each A it has `columns`. The rows of all of them lie in `groups`, each with a part of every layer: with
    one group, one layer behind the other.

    With A_i (r, in) and B_i (out_i, r) of n layers, it has A (n r, in), and B (sum of out_i, n r) with
    zeros where one layer's rows meet another's columns: one product for all is less work than what it saves
    in passes over the output."""

    names: tuple[str, ...]
    rows: tuple[slice, ...] = (_every(),)
    columns: slice = field(default_factory=_every)
    groups: int = 1

    @property
    def name(self) -> str:
        """The first layer's."""
        return self.names[0]

    def pack(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """A_i and B_i of each layer, whole -> A and B here. Of a single layer they are views."""
        heres = list(self._here(pairs))
        if len(heres) == 1:
            return heres[0]
        a = heres[0][0]
        wide = len(heres) * len(a)
        packed = (
            a.new_empty((wide, a.shape[1])),
            a.new_zeros((sum(len(b) for _, b in heres), wide)),
        )
        for here, there in zip(heres, self._parts(packed, heres), strict=True):
            for part, place in zip(here, there, strict=True):
                place.copy_(part.view(place.shape))
        return packed

    def unpack(self, packed: tuple[Tensor, Tensor], pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """The reverse, into what `pairs` has of this process."""
        heres = list(self._here(pairs))
        for here, there in zip(heres, self._parts(packed, heres), strict=True):
            for part, place in zip(here, there, strict=True):
                part.view(place.shape).copy_(place)

    def _here(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        for (a, b), rows in zip(pairs, self.rows, strict=True):
            yield a[:, self.columns], b[rows]

    def _parts(
        self, packed: tuple[Tensor, Tensor], heres: Sequence[tuple[Tensor, Tensor]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Each layer's places in A and B: (r, in), and (groups, out_i / groups, r)."""
        a, b = packed
        rank = len(a) // len(heres)
        each = [len(part) // self.groups for _, part in heres]
        for number, rows in enumerate(b.unflatten(0, (self.groups, -1)).split(each, 1)):
            mine = slice(number * rank, (number + 1) * rank)
            yield a[mine], rows[..., mine]
