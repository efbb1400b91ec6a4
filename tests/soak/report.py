"""What a soak has found, as figures, and which of its promises are broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import median

from tests.bench.figures import Figure
from tests.soak.process import Look, Turn

# A worker is back within so many seconds.
RESTART_SECONDS = 3.0
# What may not be more than at the beginning, or than a new worker's, by more than a tolerance.
FLAT = (
    *("accepted_p50_in_turn", "accepted_p99_in_turn", "ended_p50_in_turn", "ended_p99_in_turn"),
    *("cpu_in_turn", "rss", "handles", "rows", "journal", "bodies", "directories"),
)
# And what may not be more than that at all.
MOST = {"lost": 0.0, "doubled": 0.0, "problems": 0.0, "open": RESTART_SECONDS, "serve": RESTART_SECONDS}


def over_time(tenths: Sequence[Turn]) -> Iterator[Figure]:
    """Of the last tenth of the jobs, against the first."""
    jobs, seconds = sum(turn.jobs for turn in tenths), sum(turn.seconds for turn in tenths)
    yield Figure("rate", jobs / seconds, "jobs/s", tenths[0].jobs / tenths[0].seconds)
    yield from _times([tenths[-1]], [tenths[0]])
    yield _most(tenths, "rss", "MB")
    yield _most(tenths, "handles", "files")
    # They come and go by the hundred: three looks tell more than one.
    last, first = (
        median(sum(turn.done.rows.values()) for turn in some) for some in (tenths[-3:], tenths[:3])
    )
    yield Figure("rows", last, "in memory", first)
    yield Figure("journal", _bytes(tenths[-1]), "bytes/job", _bytes(tenths[0]))
    half = len(tenths) // 2
    for name, unit in (("bodies", "MB"), ("directories", "directories")):
        found, base = (max(_looks(some, name)) for some in (tenths[half:], tenths[:half]))
        yield Figure(name, found, unit, base)


def in_turn(old: Sequence[Turn], new: Sequence[Turn]) -> Iterator[Figure]:
    """Of a worker that has run for long, against one that has just begun."""
    for figure in _times(old, new):
        yield figure._replace(name=f"{figure.name}_in_turn")


def broken(figures: Sequence[Figure], tolerance: float) -> Iterator[str]:
    """The promises that these figures break, a line each."""
    for figure in figures:
        if figure.name in FLAT:
            assert figure.baseline is not None
            if not figure.value <= figure.baseline * (1 + tolerance):
                yield f"{figure.name} has grown: {figure}"
        elif not figure.value <= MOST.get(figure.name, figure.value):
            yield f"{figure.name} is over {MOST[figure.name]:g}: {figure}"


def _times(some: Sequence[Turn], base: Sequence[Turn]) -> Iterator[Figure]:
    kinds: dict[str, tuple[str, Callable[[Turn], float]]] = {
        "accepted_p50": ("ms", lambda turn: turn.done.accepted[0]),
        "accepted_p99": ("ms", lambda turn: turn.done.accepted[1]),
        "ended_p50": ("ms", lambda turn: turn.done.ended[0]),
        "ended_p99": ("ms", lambda turn: turn.done.ended[1]),
        "cpu": ("ms/job", lambda turn: turn.cpu / turn.jobs * 1000),
    }
    for name, (unit, of) in kinds.items():
        yield Figure(name, median(map(of, some)), unit, median(map(of, base)))


def _most(tenths: Sequence[Turn], name: str, unit: str) -> Figure:
    return Figure(name, max(_looks(tenths[-1:], name)), unit, max(_looks(tenths[:1], name)))


def _looks(turns: Sequence[Turn], name: str) -> list[float]:
    looks: list[Look] = [look for turn in turns for look in turn.looks]
    return [float(getattr(look, name)) for look in looks]


def _bytes(turn: Turn) -> float:
    return turn.journal / turn.jobs
