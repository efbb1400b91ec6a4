"""The simulation notices when something is taken out of Tink: so it would, if somebody broke it."""

from __future__ import annotations

import pytest

from tests.simulation import chaos, mutants

# What the promise rests on. The others are tried where the slow tests are.
FIRST = ("no-op-fence", "no-dedupe", "no-fsync")
# Of the seeds from 0 on, this many must be enough.
SEEDS = 120


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FIRST else pytest.mark.slow)
        for name in sorted(mutants.ALL, key=lambda name: name not in FIRST)
    ],
)
def test_the_simulation_fails_without_it(name: str) -> None:
    assert any(chaos.check(seed, name) is not None for seed in range(SEEDS))
