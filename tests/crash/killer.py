"""Who is killed when: drawn from the seed, or at one crash point after the other; and who does it."""

from __future__ import annotations

import math
import random
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.crash.runs import Run, say
from tests.crash.trainers import Trainer
from tests.live import LiveServer
from tests.postgres import PostgresServer
from tests.processes import kill as kill_process
from tools.megatron_trainer import RANKS

# Every second kill is followed by one at a crash point: a third of all are.
POINTED = 0.5
# A point is passed up to so often before it kills, unless a process seldom gets there.
PASSES = 3
SELDOM = re.compile(
    r"worker\.(opened|spawned|restored|snapshot-.*|bodies-pruned|removing)"
    r"|trainer\.(bound|loading|restoring)"
)
# Passed only if the trainer is a new one, or by the first that a worker starts.
AFTER_BOTH = re.compile(r"worker\.(restored|redone)")
AFTER_ALL = re.compile(r"worker\.spawned|trainer\..*")
# A point that was not reached after so long counts for nothing, and its process is just killed.
POINT_SECONDS = 60.0
# Of the other kills one out of four comes while the one before is still being recovered from, at most so
# long after it.
OVERLAP, OVERLAP_SECONDS = 0.25, 3.0
# The rest wait until that is over, for fewer than so many results more, and at most so long.
RESULTS, DELAY_SECONDS = 6, 0.3
STUCK_SECONDS = 120.0
LOOK_SECONDS = 0.01

# "trainer" is the training server, or one process of it; "both" it and the worker; "all" its parent as
# well, by which the next one would be started.
Victim = Literal["worker", "trainer", "both", "all", "database"]
VICTIMS: tuple[Victim, ...] = ("worker", "trainer", "both", "worker", "trainer", "both", "all")
# Where it is a server's: it dies as often as all others together.
WITH_DATABASE: tuple[Victim, ...] = (*VICTIMS, *["database"] * len(VICTIMS))  # type: ignore[arg-type]
How = Literal["at a random time", "during a recovery", "at a crash point"]


class Stuck(Exception):
    """The run cannot go on: its server ended by itself, or no result came for a long time."""


@dataclass(frozen=True)
class Kill:
    """`after`: results to wait for once the last kill is over; None: it does not wait for that. `delay`:
    seconds, from then on. `point`: where the victim kills itself, the `nth` time; it is told when it is
    started after the kill before, which must therefore have ended it. `rank`: which of a trainer's
    processes, where it is several."""

    victim: Victim
    after: int | None = None
    delay: float = 0.0
    point: str | None = None
    nth: int = 1
    rank: int = 0


def drawn(kills: int, seed: int, points: Sequence[str], victims: Sequence[Victim] = VICTIMS) -> list[Kill]:
    draw, ranks = random.Random(seed), random.Random(f"{seed} rank")
    planned: list[Kill] = []
    while len(planned) < kills:
        rank = ranks.randrange(RANKS)
        point = draw.choice(points) if draw.random() < POINTED else None
        victim = _before(point) if point else draw.choice(victims)
        if planned and draw.random() < OVERLAP:
            planned.append(Kill(victim, None, draw.uniform(0, OVERLAP_SECONDS), rank=rank))
        else:
            after, delay = draw.randrange(RESULTS), draw.uniform(0, DELAY_SECONDS)
            planned.append(Kill(victim, after, delay, rank=rank))
        if point:
            planned.append(_at(point, 1 if SELDOM.fullmatch(point) else draw.randint(1, PASSES)))
    return planned[:kills]


def each_point(points: Sequence[str]) -> list[Kill]:
    """Every one once. A worker that has just died at one can be sent to the next at once."""
    planned: list[Kill] = []
    for point in points:
        if not planned or planned[-1].victim == "trainer" or _before(point) != "worker":
            planned.append(Kill(_before(point), after=1))
        planned.append(_at(point, 1))
    return planned


def _before(point: str) -> Victim:
    if AFTER_ALL.fullmatch(point):
        return "all"
    return "both" if AFTER_BOTH.fullmatch(point) else "worker"


def _at(point: str, nth: int) -> Kill:
    return Kill("worker" if point.startswith("worker.") else "trainer", point=point, nth=nth)


@dataclass(frozen=True)
class Done:
    """A kill that was done, at `time` (monotonic)."""

    victim: Victim
    how: How
    time: float
    point: str | None = None


@dataclass
class Killer:
    """Kills the server while the runs go on. A worker that is dead is started again at once, as a service
    manager would do it; a trainer is its parent's affair, unless that is dead as well."""

    server: LiveServer
    trainer: Trainer
    runs: list[Run]
    database: PostgresServer | None = None
    done: list[Done] = field(default_factory=list)
    # How long the logs were when the worker was started last; whether it is about to kill itself.
    _logged: dict[Path, int] = field(default_factory=dict)
    _crashing: bool = False

    def work(self, kills: list[Kill]) -> None:
        """Returns when the last kill has been recovered from, or a run has failed. Raises Stuck."""
        for number, kill in enumerate(kills, 1):
            following = kills[number] if number < len(kills) else None
            began = time.monotonic()
            done = self._do(kill)
            if any(run.error for run in self.runs):
                break
            self.done.append(done)
            self._start(done.victim, following)
            say(
                f"kill {number:3} of {len(kills)}: {done.victim:7} {done.how}, {done.point or ''} after "
                f"{self._count()} results and {done.time - began:.1f} s"
            )
        self._wait(self._recovered)
        for run in self.runs:
            run.enough.set()

    def await_end(self) -> None:
        """Returns when both runs have ended. Raises Stuck."""
        self._wait(lambda: all(run.ended for run in self.runs))

    def recoveries(self) -> list[float]:
        """Seconds from each kill until every run has had a result."""
        return [self._first_results(done.time) - done.time for done in self.done]

    # -- one kill -----------------------------------------------------------------------------------

    def _do(self, kill: Kill) -> Done:
        how: How = "at a random time"
        if kill.point is not None:
            if self._reached(kill):
                return Done(kill.victim, "at a crash point", time.monotonic(), kill.point)
            say(f"{kill.point}:{kill.nth} was not reached")
        elif kill.after is None:
            how = "during a recovery"
        else:
            self._wait(self._recovered)
            results = self._count() + kill.after
            self._wait(lambda: self._count() >= results)
        self._wait(lambda: False, seconds=kill.delay)
        if kill.victim in ("trainer", "both"):
            # After another kill there may be none for a moment.
            self._wait(lambda: self.trainer.rank(kill.rank) is not None)
        process = self.trainer.rank(kill.rank)
        done = Done(kill.victim, how, time.monotonic())
        if kill.victim in ("trainer", "both") and process is not None:
            kill_process(process)
        if kill.victim == "all":
            self.trainer.kill()
        if kill.victim == "database":
            assert self.database is not None
            self.database.kill()
            self.database.start()
        elif kill.victim != "trainer":
            self.server.kill()
        if kill.victim == "all":
            self.trainer.kill()  # the worker may have been quick
        return done

    def _start(self, killed: Victim, following: Kill | None) -> None:
        """What does not run and is nobody else's to start. It is told where the next kill is."""
        assert self.server.process is not None
        if self.server.process.poll() is None:
            return
        self.server.environment.pop("TINK_CRASH_AT", None)
        victim = at = ""
        if following is not None and following.point is not None:
            victim, at = following.victim, f"{following.point}:{following.nth}"
        self._logged = {log: log.stat().st_size for log in self._logs.values()}
        if killed == "all":
            self.trainer.start(at if victim == "trainer" else "")
        if victim == "worker":
            self.server.environment["TINK_CRASH_AT"] = at
        self.server.start(wait=False)

    def _reached(self, kill: Kill) -> bool:
        """Waits for the victim to kill itself, and says whether it did."""
        log = self._logs[kill.victim]
        words = f"crash point {kill.point}, ".encode()

        def told() -> bool:
            with log.open("rb") as file:
                file.seek(self._logged[log])
                return words in file.read()

        self._crashing = kill.victim == "worker"
        self._wait(told, seconds=POINT_SECONDS)
        reached = told()
        if reached and self._crashing:
            assert self.server.process is not None
            status = self.server.process.wait()
            if status != -signal.SIGKILL:
                raise Stuck(f"tink serve ended with status {status}, not by its crash point")
        self._crashing = False
        return reached

    @property
    def _logs(self) -> dict[str, Path]:
        return {"worker": self.server.log, "trainer": self.trainer.log}

    # -- the runs -----------------------------------------------------------------------------------

    def _count(self) -> int:
        return sum(len(run.results) for run in self.runs)

    def _first_results(self, after: float) -> float:
        return max(next((at for at in run.results if at > after), after) for run in self.runs)

    def _recovered(self) -> bool:
        last = self.done[-1].time if self.done else 0.0
        return all(run.results and run.results[-1] > last for run in self.runs)

    def _wait(self, done: Callable[[], Any], seconds: float = math.inf) -> None:
        """Until it is done, the seconds are over, or a run has failed. Raises Stuck."""
        began = time.monotonic()
        while time.monotonic() - began < seconds and not done():
            assert self.server.process is not None
            status = self.server.process.poll()
            if status is not None and not (self._crashing and status == -signal.SIGKILL):
                raise Stuck(f"tink serve ended by itself, with status {status}")
            last = max([began, *(run.results[-1] for run in self.runs if run.results)])
            if time.monotonic() - last > STUCK_SECONDS:
                raise Stuck(f"no result for {STUCK_SECONDS:.0f} s")
            if any(run.error for run in self.runs):
                return
            time.sleep(LOOK_SECONDS)
