"""`tink status`: what runs on a home, what waits there, and what happened last."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

import tink
from tink.cli import printing, stages
from tink.cli.homes import find_home
from tink.cli.jobs import JobLine, job_line, print_jobs
from tink.cli.options import add_home
from tink.cli.stages import Stages
from tink.doctor import processes
from tink.doctor.processes import TrainerStatus, WorkerStatus
from tink.domain import rows
from tink.domain.events import Diverged
from tink.journal import queries, store
from tink.journal.database import database
from tink.journal.reader import open_journal
from tink.limits import STAGES_JOBS
from tink.world import World

HELP = "what runs, the queue, models, sessions, last jobs"
DESCRIPTION = """\
Prints what runs on a home (worker, trainer), the queue, models, sessions and
the last jobs. Works while the worker runs and when it does not, and never
disturbs it."""
EPILOG = """\
examples:
  tink status
  tink status --home /srv/tink --json
  tink status >/dev/null || echo "the worker needs a look"

exit status: 0 the worker runs and answers; 1 it runs, but it, its trainer or a
vLLM server does not answer; 2 there is no such home or journal; 3 no worker runs"""

SHOWN = 10


class Queue(msgspec.Struct, kw_only=True):
    """`oldest_seconds`: the age of the open job that was submitted first."""

    open: int
    oldest_seconds: float | None
    by_op: dict[str, dict[str, int]]


class Disk(msgspec.Struct, kw_only=True):
    """Bytes: of the two databases' files, and of what is live under the artifact folder."""

    journal: int
    bodies: int
    checkpoints: int
    adapters: int
    snapshots: int


class Status(msgspec.Struct, kw_only=True):
    home: str
    version: str
    worker: WorkerStatus
    trainer: TrainerStatus
    events: int
    diverged: int
    queue: Queue
    disk: Disk
    jobs: dict[str, int]
    models: dict[str, int]
    sessions: dict[str, int]
    last_models: list[rows.Model]
    last_sessions: list[rows.Session]
    last_jobs: list[JobLine]
    stages: dict[str, Stages]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_home(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    world = World()
    found = collect(arguments.home, world)
    if arguments.json:
        printing.print_document(found)
    else:
        _print(found, world.now())
    match found.worker.state:
        case "running":
            # A worker that only samples, on vLLM, has no trainer.
            trains = "trainer" in found.worker.servers or not found.worker.servers
            well = found.trainer.state in ("ready", "loading") or not trains
            return 0 if well and all(state == "ready" for state in _vllm(found).values()) else 1
        case "silent" | "starting":
            return 1
    return 3


def _vllm(found: Status) -> dict[str, str]:
    return {name: state for name, state in found.worker.servers.items() if name != "trainer"}


def collect(option: Path | None, world: World) -> Status:
    home = find_home(option)
    with open_journal(home) as connection:
        last = queries.last_incarnation(connection)
        open_jobs = queries.open_jobs(connection)
        events = queries.count_events(connection)
        diverged = store.count(connection, Diverged)
        sizes = queries.sizes(connection)
        counts = {name: queries.count(connection, name) for name in ("jobs", "models", "sessions")}
        models = queries.latest_models(connection, SHOWN)
        sessions = queries.latest_sessions(connection, SHOWN)
        newest = queries.jobs(connection, limit=STAGES_JOBS)
    now = world.now()
    worker, trainer = processes.look(home, last, world)
    return Status(
        home=str(home.root),
        version=tink.__version__,
        worker=worker,
        trainer=trainer,
        events=events,
        diverged=diverged,
        queue=_queue(open_jobs, now),
        disk=Disk(
            journal=database(home, "journal").bytes(),
            bodies=database(home, "bodies").bytes(),
            **sizes._asdict(),
        ),
        last_models=models,
        last_sessions=sessions,
        last_jobs=[job_line(job, now) for job in newest[:SHOWN]],
        stages=stages.of(newest),
        **counts,
    )


def _queue(groups: list[queries.OpenJobs], now: float) -> Queue:
    by_op: dict[str, dict[str, int]] = {}
    for group in groups:
        by_op.setdefault(group.op, {})[group.state] = group.number
    oldest = min((group.oldest for group in groups), default=None)
    return Queue(
        open=sum(group.number for group in groups),
        oldest_seconds=None if oldest is None else now - oldest,
        by_op=by_op,
    )


def _print(found: Status, now: float) -> None:
    console = printing.console()
    facts = printing.facts()
    facts.add_row("home", printing.text(found.home))
    facts.add_row("worker", _worker(found.worker))
    facts.add_row("trainer", _trainer(found.trainer))
    for url, state in _vllm(found).items():
        word, _, reason = state.partition(": ")
        line = f"{printing.state(word)}, {printing.text(url)}"
        facts.add_row("vllm", f"{line}: {printing.text(reason)}" if reason else line)
    facts.add_row("journal", f"{found.events:,} events; jobs: {_counts(found.jobs)}")
    if found.diverged:
        facts.add_row("diverged", f"[red]{found.diverged:,} redone result(s) differ from the journaled[/]")
    facts.add_row("queue", _queue_line(found.queue))
    for group, some in found.stages.items():
        facts.add_row(group, _stages_line(some))
    sizes = msgspec.structs.asdict(found.disk)
    facts.add_row("disk", ", ".join(f"{name} {printing.size(size)}" for name, size in sizes.items()))
    console.print(facts)
    if found.last_models:
        console.print()
        _print_models(found, now)
    if found.last_sessions:
        console.print()
        _print_sessions(found, now)
    if found.last_jobs:
        console.print()
        print_jobs(found.last_jobs, now, title="last jobs")


def _worker(worker: WorkerStatus) -> str:
    name, where = printing.state(worker.state), f"pid {worker.pid}, {printing.text(worker.url)}"
    match worker.state:
        case "running":
            return (
                f"{name}, {where}, up {printing.duration(worker.uptime_seconds)}, tink {worker.version}, "
                f"start {worker.incarnation}; {printing.text(worker.mode)}"
            )
        case "silent":
            return f"{name}: the process runs ({where}) and does not answer; it may wait for its trainer"
        case "starting":
            return f"{name}, pid {worker.pid}"
        case "stopped":
            return f"{name}, since {printing.moment(worker.stopped_at)}: 'tink serve' starts it"
        case "crashed":
            return (
                f"{name}: the one of {printing.moment(worker.started_at)} ended without stopping; what it "
                "acknowledged is in the journal, and 'tink serve' goes on with it"
            )
    return "none has run here yet: 'tink serve' starts one"


def _trainer(trainer: TrainerStatus) -> str:
    line = printing.state(trainer.state)
    if trainer.pid is not None:
        line += f", pid {trainer.pid}, {printing.text(trainer.url)}"
    if trainer.detail:
        line += f": {printing.text(trainer.detail)}"
    for op in trainer.running:
        line += f"; runs {printing.text(op.job_id)} for {printing.duration(op.seconds)}"
    return line


def _stages_line(some: Stages) -> str:
    parts = {"waited": some.waited, "in the server": some.server, "in the worker": some.worker}
    if some.idle is not None:
        parts["the trainer idle before it"] = some.idle
    told = ", ".join(f"{name} {printing.duration(ms / 1000)}" for name, ms in parts.items())
    return f"{told} (medians of the last {some.jobs:,})"


def _queue_line(queue: Queue) -> str:
    if not queue.open:
        return "empty"
    by_op = [f"{op} ({_counts(states)})" for op, states in queue.by_op.items()]
    return (
        f"{queue.open:,} open, the oldest for {printing.duration(queue.oldest_seconds)}: {', '.join(by_op)}"
    )


def _counts(states: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {state}" for state, number in states.items()) or "none"


def _print_models(found: Status, now: float) -> None:
    table = printing.table(
        "MODEL", "STATE", "RANK", "OPS", "LAST REQUEST", "TENANT", "BASE MODEL",
        title=f"models: {_counts(found.models)}", right=("RANK", "OPS"),
    )  # fmt: skip
    for model in found.last_models:
        table.add_row(
            printing.text(model.model_id),
            printing.state(model.state),
            printing.number(model.rank),
            printing.number(model.op_no),
            printing.ago(now - model.last_request_at),
            printing.text(model.tenant),
            printing.text(model.base_model),
        )
    printing.console(printing.LIST_COLUMNS).print(table)


def _print_sessions(found: Status, now: float) -> None:
    table = printing.table(
        "SESSION", "STATE", "CREATED", "TENANT", "SDK", "TAGS",
        title=f"sessions: {_counts(found.sessions)}",
    )  # fmt: skip
    for session in found.last_sessions:
        table.add_row(
            printing.text(session.session_id),
            session.state,
            printing.ago(now - session.created_at),
            printing.text(session.tenant),
            printing.text(session.sdk_version),
            printing.text(", ".join(session.tags)),
        )
    printing.console(printing.LIST_COLUMNS).print(table)
