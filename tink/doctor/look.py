"""All that `tink doctor` looks at, in the order in which it tells of it."""

from __future__ import annotations

from collections.abc import Iterator

import trio

from tink.backends.endpoint import ExternalEndpoint
from tink.doctor import machine, processes
from tink.doctor.findings import Finding, ok, warning, wrong
from tink.doctor.processes import WorkerStatus
from tink.doctor.servers import Servers
from tink.domain import rows
from tink.errors import StartupError
from tink.home import Home
from tink.journal import queries
from tink.journal.database import database
from tink.journal.reader import open_journal
from tink.settings import Reading, Settings
from tink.world import World


def look(
    reading: Reading, problems: list[str], trainer: ExternalEndpoint, world: World
) -> Iterator[Finding]:
    """`problems`: of settings that can be read, why a start would fail here. `trainer`: where the settings
    say that one is."""
    settings = reading.settings
    yield from machine.settings(reading, problems)
    yield from machine.engine(settings)
    yield from machine.folders(settings)
    yield from machine.journal(settings.home_folder, world)
    yield machine.versions()
    yield from _worker(settings, world)
    if not reading.problems:
        yield from trio.run(Servers(settings, trainer, world).look)


def _worker(settings: Settings, world: World) -> Iterator[Finding]:
    """The one that runs on the home; without one, whether its port can be had."""
    home = settings.home_folder
    last = _last(home)
    worker, trainer = processes.look(home, last, world)
    if worker.state in ("new", "stopped", "crashed"):
        yield ok("worker", f"none runs on {home.root}; start it with 'tink serve'")
        yield machine.port(settings, world)
        return
    yield _running(worker)
    if last is not None and last.settings_digest != settings.digest:
        yield warning(
            "worker",
            "it was started with other settings than those here, which is what the rest of this is about",
            "run 'tink doctor' with the worker's environment, or start the worker again with this one",
        )
    if "hf" in settings.routes:
        if trainer.state in ("ready", "loading"):
            yield ok("trainer", f"embedded, {trainer.state}, pid {trainer.pid}")
        else:
            remedy = f"see {home.trainer_log}"
            yield wrong("trainer", f"embedded, {trainer.state}: {trainer.detail or 'no answer'}", remedy)


def _running(worker: WorkerStatus) -> Finding:
    if worker.state == "running":
        return ok("worker", f"runs, pid {worker.pid}, {worker.url}")
    if worker.state == "starting":
        return warning("worker", f"starts, pid {worker.pid}", "wait for it")
    detail = f"pid {worker.pid} does not answer at {worker.url}"
    return wrong("worker", detail, f"kill -9 {worker.pid}, and start it again")


def _last(home: Home) -> rows.Incarnation | None:
    try:
        if not database(home, "journal").exists():
            return None
        with open_journal(home) as connection:
            return queries.last_incarnation(connection)
    except StartupError:  # it is a finding of its own
        return None
