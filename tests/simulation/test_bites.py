"""The simulation notices when something is taken out of Tink: so it would, if somebody broke it."""

from __future__ import annotations

import pytest

from tests.simulation import chaos, mutants

# What the promise rests on. The others are tried where the slow tests are.
FIRST = ("no-op-fence", "no-dedupe", "no-fsync")
# Of the seeds from 0 on, this many must be enough.
SEEDS = 120
# Those that need the most: the seed that has noticed it before is tried first, which saves minutes.
NOTICED = {
    "base-model-for-a-missing-adapter": 88,
    "damage-unnoticed": 73,
    "eviction-of-what-is-in-use": 25,
    "restore-goes-back": 30,
}


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
