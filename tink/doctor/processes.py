"""Who runs on a home: the processes that its files name, and what they answer."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Literal

import msgspec
import trio

from tink.backends.exchange import HttpClient, NoAnswer, exchange
from tink.backends.trainer import TrainerClient, TrainerGone
from tink.domain import rows
from tink.errors import UNREADABLE
from tink.home import Home
from tink.limits import STATUS_SECONDS
from tink.wire import tink_train
from tink.world import World


class WorkerStatus(msgspec.Struct, kw_only=True):
    """`running`: it answers. `silent`: the process is there, and does not (it may wait for its trainer).
    `starting`: it has the home's lock and does not listen yet. `stopped`, `crashed`: nothing runs, and
    the last one did or did not stop by itself. `started_at` is that of the last one, running or not.
    `servers`: what it says of those that it sends work to, by name or URL: `ready`, or why it waits."""

    state: Literal["running", "silent", "starting", "stopped", "crashed", "new"]
    pid: int | None = None
    url: str | None = None
    version: str | None = None
    mode: str | None = None
    incarnation: int | None = None
    started_at: float | None = None
    stopped_at: float | None = None
    uptime_seconds: float | None = None
    servers: dict[str, str] = {}


class TrainerStatus(msgspec.Struct, kw_only=True):
    """`silent`: the process is there, and does not answer. `awaited`: it is none of the worker's own, which
    waits for it. `detail`: why it is not ready, or what it cannot do."""

    state: Literal["ready", "loading", "broken", "silent", "stopped", "awaited"]
    pid: int | None = None
    url: str | None = None
    incarnation: str | None = None
    detail: str = ""
    running: list[tink_train.Running] = []


class _Health(msgspec.Struct):
    servers: dict[str, str] = {}


def look(home: Home, last: rows.Incarnation | None, world: World) -> tuple[WorkerStatus, TrainerStatus]:
    """Takes STATUS_SECONDS at most."""

    async def both() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_ask_worker, worker, world)
            nursery.start_soon(_ask_trainer, trainer, world)

    worker, trainer = _worker(home, last, world), _trainer(home)
    trio.run(both)
    if trainer.state == "stopped" and "trainer" in worker.servers:
        state, _, trainer.detail = worker.servers["trainer"].partition(": ")
        trainer.state = "ready" if state == "ready" else "awaited"
    return worker, trainer


def _worker(home: Home, last: rows.Incarnation | None, world: World) -> WorkerStatus:
    """As far as files and processes tell."""
    status = WorkerStatus(state="new")
    if last is not None:
        status = WorkerStatus(
            state="crashed" if last.stopped_at is None else "stopped",
            version=last.version,
            incarnation=last.number,
            started_at=last.started_at,
            stopped_at=last.stopped_at,
        )
    record = home.worker_record()
    if record is not None and alive(record.pid, "tink"):
        status.state = "silent"
        status.pid, status.url, status.version, status.mode = (
            record.pid,
            record.url,
            record.version,
            record.mode,
        )
        if last is not None:
            status.uptime_seconds = world.now() - last.started_at
    elif (owner := home.lock_owner()) is not None and alive(owner, "tink"):
        status.state, status.pid = "starting", owner
    return status


def _trainer(home: Home) -> TrainerStatus:
    record = home.trainer_record()
    if record is None or not alive(record.pid, "tink"):
        return TrainerStatus(state="stopped")
    return TrainerStatus(state="silent", pid=record.pid, url=f"http://127.0.0.1:{record.port}")


async def _ask_worker(status: WorkerStatus, world: World) -> None:
    if status.url is None:
        return
    with contextlib.suppress(NoAnswer):
        async with HttpClient.connect(status.url, world, slots=1) as client:
            answer = await exchange(client, "GET", "/healthz", seconds=STATUS_SECONDS)
        if answer.status == 200:
            status.state = "running"
            with contextlib.suppress(*UNREADABLE):
                status.servers = msgspec.json.decode(answer.content, type=_Health).servers


async def _ask_trainer(status: TrainerStatus, world: World) -> None:
    if status.url is None:
        return
    with trio.move_on_after(STATUS_SECONDS), contextlib.suppress(TrainerGone):
        async with TrainerClient.connect(status.url, world, slots=1) as client:
            health = await client.health()
        status.state, status.detail = health.state, health.detail
        status.incarnation, status.running = health.incarnation, health.running


def alive(pid: int, word: str) -> bool:
    """Whether such a process runs and has `word` in its command line: after a reboot a number that is in
    a file belongs to anyone."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        # Empty for a process that has ended and waits for its parent to notice.
        return word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True  # a system without /proc
