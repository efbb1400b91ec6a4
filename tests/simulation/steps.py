"""One short program, crashed before every single step of it, and before every step of its recovery.

python -m tests.simulation.steps [--every N] [--jobs N]
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.simulation import chaos
from tests.simulation.faults import Fault, Moment, What
from tests.simulation.program import Model, Op, Program

# One of each, with a snapshot behind the step: few task steps, to crash at each of them.
KINDS = ("train", "step", "sampler", "sample", "save", "train")
SHORT = Program(
    models=[Model("alice", [Op(kind, 1) for kind in KINDS])],
    faults=[],
    loss=0.0,
    duplicates=0.0,
    slow=0.0,
    jump=0.0,
    snapshot_seconds=0.0,
    retention_hours=0.0,
)
VICTIMS: tuple[What, ...] = ("worker", "trainer", "both", "power")

Faults = tuple[Fault, ...]


@functools.cache
def undisturbed() -> chaos.Result:
    return _simulate(())


def crashes(every: int = 1) -> Iterator[Faults]:
    """Every n-th step, by each victim in turn; in the second half it comes into the recovery from another
    crash, in the middle of the program."""
    steps = undisturbed().steps
    first = Fault(Moment(steps=steps * 2 // 3), "both", 0.0)
    for number, step in enumerate(range(1, steps, every)):
        yield (Fault(Moment(steps=step), VICTIMS[number % len(VICTIMS)], 0.0),)
    for number, step in enumerate(range(1, steps // 2, every)):
        yield first, Fault(Moment(steps=step), VICTIMS[number % len(VICTIMS)], 0.0)


def check(faults: Faults) -> str | None:
    """What is wrong, or None."""
    chaos.quiet()
    try:
        crashed = _simulate(faults)
    except (Exception, BaseExceptionGroup) as error:
        return f"{faults}: {chaos.innermost(error)}"
    wrong = chaos.difference(undisturbed(), crashed)
    return None if wrong is None else f"{faults}: {wrong}"


def _simulate(faults: Faults) -> chaos.Result:
    what = SHORT._replace(faults=list(faults))
    with tempfile.TemporaryDirectory(dir=chaos.SCRATCH) as folder:
        return chaos.simulate(Path(folder) / "home", 0, what, disturbed=bool(faults))


def main() -> int:
    parser = argparse.ArgumentParser(description="Crashes one short program before every step of it.")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    chaos.quiet()
    with ProcessPoolExecutor(options.jobs) as pool:
        verdicts = list(pool.map(check, crashes(options.every), chunksize=8))
    wrong = [verdict for verdict in verdicts if verdict is not None]
    print("\n".join([*wrong, f"crashes={len(verdicts)} failed={len(wrong)}"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
