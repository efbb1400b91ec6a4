"""What a bench prints: one row for each figure."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import quantiles
from typing import NamedTuple


class Figure(NamedTuple):
    """`baseline`: the same figure of what this one is compared with."""

    name: str
    value: float
    unit: str
    baseline: float | None = None

    def __str__(self) -> str:
        row = f"{self.name} {_number(self.value)} {self.unit}"
        if self.baseline is None:
            return row
        ratio = f"{self.value / self.baseline:.2f}" if self.baseline else "-"
        return f"{row} ({_number(self.baseline)}, {ratio})"


def percentile(values: Sequence[float], number: int) -> float:
    """The value that so many of a hundred are not above."""
    return quantiles(values, n=100)[number - 1]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or value >= 1000 else f"{value:.3g}"
