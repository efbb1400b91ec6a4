"""The simulation notices when something is taken out of Tink: so it would, if somebody broke it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from tests.simulation import chaos, mutants

# What the promise rests on. The others are tried where the slow tests are.
FIRST = ("no-op-fence", "no-dedupe", "no-fsync")
# Of the seeds from 0 on, this many must be enough.
SEEDS = 120
# Those that need the most: the seed that has noticed it before is tried first, which saves minutes.
NOTICED = {
    "base-model-for-a-missing-adapter": 88,
    "damage-unnoticed": 158,
    "eviction-of-what-is-in-use": 25,
    "restore-goes-back": 119,
}


class Places:
    """Takes a mutant's patches, and makes none."""

    def __init__(self) -> None:
        self.taken: list[tuple[object, str, object]] = []

    def setattr(self, target: object, name: str, value: object) -> None:
        self.taken.append((target, name, value))

    def setitem(self, mapping: dict[str, object], name: str, value: object) -> None:
        assert name in mapping


def test_the_documentation_tells_of_each() -> None:
    page = Path(__file__).parents[2] / "docs" / "simulation.md"
    told = re.findall(r"^\| `([a-z-]+)` \|.*\| \d+ \|$", page.read_text(), re.MULTILINE)
    assert sorted(told) == sorted(mutants.ALL)


@pytest.mark.parametrize("name", mutants.ALL)
def test_a_mutant_is_called_as_what_it_replaces(name: str) -> None:
    """Else its TypeError would be what the simulation notices."""
    places = Places()
    mutants.ALL[name](cast(pytest.MonkeyPatch, places))
    for target, attribute, value in places.taken:
        replaced = getattr(target, attribute)
        if callable(replaced):
            given = [
                parameter
                for parameter in inspect.signature(replaced).parameters.values()
                if parameter.kind is not parameter.VAR_KEYWORD
            ]
            named = {p.name: p for p in given if p.kind is p.KEYWORD_ONLY}
            inspect.signature(cast(Callable[..., object], value)).bind(
                *given[: len(given) - len(named)], **named
            )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FIRST else pytest.mark.slow)
        for name in sorted(mutants.ALL, key=lambda name: name not in FIRST)
    ],
)
def test_the_simulation_fails_without_it(name: str) -> None:
    seeds = (NOTICED.get(name, 0), *range(SEEDS))
    assert any(chaos.check(seed, name) is not None for seed in seeds)
