"""Faults: what goes wrong, when, and how it comes back. A moment is a time, a number of task steps (so that
a crash can come at any await), or a number of steps after something has begun."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import trio

from tests.simulation.cluster import Ambush, Cluster
from tests.simulation.doubles import Nature
from tests.vllm.double import VllmDouble
from tink.domain import rows

What = Literal["worker", "trainer", "both", "power", "torn", "disk", "damage", "clock"]
# What may be wrong with a vLLM server: `unload` takes half of its adapters away.
Mishap = Literal["kill", "drain", "pause", "hang", "freeze", "unload"]
# What a moment may wait for: see doubles.py.
OCCASIONS = ("redo", "restore", "snapshot", "op", "sample", "ahead", "commit", "boot", "state", "poll")
# A moment that does not come by then is now.
PATIENCE_SECONDS = 3.0


class Moment(NamedTuple):
    """`seconds` after the fault before; then at the start of the `count`th `occasion`, if there is one;
    then before so many more task steps."""

    seconds: float = 0.0
    occasion: str | None = None
    count: int = 1
    steps: int = 0


class Fault(NamedTuple):
    """`worker`, `trainer`, `both`: killed. `power`: a power cut; `torn`: one in the next commit. `disk`:
    the next commit fails. `damage`: the trainer dies, and the newest snapshot is spoiled. `clock`: the
    wall clock jumps. `pause`: seconds until what is down is started again."""

    moment: Moment
    what: What
    pause: float


def draw(rng: random.Random) -> list[Fault]:
    """The faults of one program. What recovers is struck again, as often as not."""
    faults: list[Fault] = []
    for _ in range(rng.randint(2, 8)):
        recovers = bool(faults) and faults[-1].what not in ("worker", "disk", "clock")
        if recovers and rng.random() < 0.5:
            moment = Moment(occasion=rng.choice(["redo", "restore"]), count=rng.choice([1, 1, 2]))
            moment = moment._replace(steps=rng.choice(_A_FEW))
        else:
            moment = _moment(rng)
        what = rng.choice(_WHAT)
        if what == "damage":  # as soon as there is something to damage
            moment = Moment(occasion="commit", steps=rng.choice(_A_FEW))
        faults.append(Fault(moment, what, rng.choice([0.0, 0.0, 0.0, 0.2, 3.0])))
    return faults


_A_FEW = (0, 0, 1, 2, 3, 5, 8, 13, 21)
_KILLS: list[What] = ["worker", "worker", "worker", "trainer", "trainer", "trainer", "both", "both"]
_WHAT: list[What] = [*_KILLS, "power", "power", "torn", "torn", "disk", "damage", "damage", "clock"]


def _moment(rng: random.Random) -> Moment:
    kind = rng.choice(["time", "steps", "steps", "occasion", "occasion"])
    if kind == "time":
        return Moment(rng.uniform(0.02, 1.0))
    if kind == "steps":
        return Moment(rng.uniform(0.0, 0.3), steps=rng.randint(1, 300))
    occasion = rng.choice([*OCCASIONS, "snapshot", "snapshot"])
    return Moment(rng.uniform(0.0, 0.5), occasion, rng.choice([1, 1, 2, 4]), rng.choice(_A_FEW))


class Steps(trio.abc.Instrument):
    """Counts the steps of all tasks, and calls back between two of them."""

    def __init__(self) -> None:
        self.count = 0
        self._due: defaultdict[int, list[Callable[[], None]]] = defaultdict(list)

    def after(self, steps: int, call: Callable[[], None]) -> None:
        self._due[self.count + max(1, steps)].append(call)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.count += 1
        for call in self._due.pop(self.count, ()):
            call()


async def strike(cluster: Cluster, faults: list[Fault], steps: Steps) -> None:
    """One after the other. What is down comes back by itself, maybe after the next one has struck."""
    async with trio.open_nursery() as nursery:
        for fault in faults:
            await _Strike(cluster, fault, steps).wait()
            nursery.start_soon(_come_back, cluster, fault)


class _Strike:
    """One fault: waits for its moment, and strikes in it."""

    def __init__(self, cluster: Cluster, fault: Fault, steps: Steps) -> None:
        self._cluster, self._fault, self._steps = cluster, fault, steps
        self._left = fault.moment.count
        self._done = trio.Event()

    async def wait(self) -> None:
        moment = self._fault.moment
        await trio.sleep(moment.seconds)
        listeners = self._cluster.nature.listeners
        with trio.move_on_after(PATIENCE_SECONDS):
            if moment.occasion is not None:
                listeners.append(self._hear)
            else:
                self._steps.after(moment.steps, self._strike)
            await self._done.wait()
        if self._hear in listeners:
            listeners.remove(self._hear)
        self._strike()

    def _hear(self, occasion: str) -> None:
        if self._fault.what == "damage" and not _spoilable(self._cluster):
            return
        if occasion == self._fault.moment.occasion and self._left:
            self._left -= 1
            if not self._left:
                self._steps.after(self._fault.moment.steps, self._strike)

    def _strike(self) -> None:
        if not self._done.is_set():
            self._done.set()
            _do(self._cluster, self._fault.what)


def _do(cluster: Cluster, what: What) -> None:
    nature = cluster.nature
    nature.counts[what] += 1
    if what not in ("torn", "disk", "clock"):
        for occasion in OCCASIONS:
            nature.counts[f"{what} during {occasion}"] += nature.going_on[occasion] > 0
    match what:
        case "worker":
            cluster.crash_worker()
        case "trainer":
            cluster.trainer.kill()
        case "both":
            cluster.trainer.kill()
            cluster.crash_worker()
        case "power":
            cluster.cut_power()
        case "torn":
            cluster.ambush = Ambush("power")
        case "disk":
            cluster.ambush = Ambush(nature.rng.choice(["full before", "full after"]))
        case "damage":
            _damage(cluster)
            cluster.trainer.kill()
        case "clock":
            nature.wall += nature.rng.choice([-1.0, -0.001, 0.001, 1.0]) * nature.jump * nature.rng.random()


# -- vLLM servers -----------------------------------------------------------------------------------


async def trouble(nature: Nature, server: VllmDouble) -> None:
    """For as long as it runs something is wrong with the server, and then it is well again."""
    rng = nature.rng
    while True:
        await trio.sleep(rng.expovariate(3.0))
        what = rng.choice(get_args(Mishap))
        nature.counts[f"vllm {what}"] += 1
        match what:
            case "unload":
                for name in rng.sample(sorted(server.adapters), len(server.adapters) // 2):
                    del server.adapters[name]
            case _:
                getattr(server, what)()
        await trio.sleep(rng.choice([0.0, 0.0, 0.2, 1.0, 3.0, 20.0]))
        mend(server)


def mend(server: VllmDouble) -> None:
    server.recover()
    server.resume()
    if not server.up or server.draining:
        server.kill()
        server.start()


async def _come_back(cluster: Cluster, fault: Fault) -> None:
    if (ambush := cluster.ambush) is not None:
        with trio.move_on_after(PATIENCE_SECONDS):
            await ambush.sprung.wait()
            await cluster.worker_ended()
        cluster.ambush = None
    await trio.sleep(fault.pause)
    # Either may come back first.
    starts = [cluster.start_worker, cluster.start_trainer]
    cluster.rng.shuffle(starts)
    for start in starts:
        await start()


def _spoilable(cluster: Cluster) -> list[str]:
    """The newest snapshots of models that have another one, which is whole, and jobs to be run."""
    live: defaultdict[str, list[rows.Snapshot]] = defaultdict(list)
    for snapshot in cluster.watch.ledger.snapshots.values():
        if snapshot.state == "live":
            live[snapshot.model_id].append(snapshot)
    in_use = {job.model_id for job in cluster.watch.ledger.jobs.values() if not job.ended}
    found = []
    for model_id, snapshots in live.items():
        directories = [s.directory for s in sorted(snapshots, key=lambda s: s.op_no)]
        is_whole = not cluster.watch.damaged.intersection(directories)
        if model_id in in_use and len(directories) > 1 and is_whole:
            found.append(directories[-1])
    return found


def _damage(cluster: Cluster) -> None:
    for directory in _spoilable(cluster)[:1]:
        cluster.nature.counts["snapshots damaged"] += 1
        cluster.watch.damaged.add(directory)
        files = sorted((cluster.trainer.artifacts / directory).iterdir())
        # Nothing but its hash protects the state: most else would be found out anyway.
        spoiled = cluster.rng.choice([*files, *3 * [cluster.trainer.artifacts / directory / "state"]])
        content = spoiled.read_bytes()
        # Empty, cut off, or as good as before but for one digit.
        flipped = content.translate(bytes.maketrans(b"01", b"10"))
        spoiled.write_bytes(cluster.rng.choice([b"", content[:-1], *3 * [flipped]]))
