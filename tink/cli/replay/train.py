"""`tink replay train`: a model's training, done again on a training server of its own."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import msgspec
import trio
from rich.progress import TimeElapsedColumn

from tink import manifest
from tink.addresses import is_origin
from tink.cli import printing
from tink.cli.homes import readable_home
from tink.cli.options import add_home, positive
from tink.cli.progress import bar
from tink.domain import ids, rows
from tink.domain.events import TrainerStarted
from tink.domain.ledger import Ledger
from tink.errors import UserError
from tink.home import Home
from tink.journal import queries, store
from tink.journal.recording import Recording, open_recording
from tink.limits import REPLAY_SHOWN
from tink.logs import configure_logs, write_line
from tink.replay import adapter, bundle, fork, server
from tink.replay.comparison import Comparison, pruned_results
from tink.replay.reach import remains
from tink.replay.rerun import Rerun
from tink.replay.server import Server
from tink.replay.training import Change, Edits, Schedule, schedule
from tink.settings import Settings
from tink.world import World

HELP = "a model's training, compared with what it gave; its adapter at any step"
DESCRIPTION = """\
Sends a model's journaled operations to a fresh training server, which it starts
and ends itself, up to an optimizer step, and compares each loss, log-probability
and metric with what was journaled. Nothing of the run is changed, and its worker
may run meanwhile."""
EPILOG = """\
MODEL is a training run's id, as 'tink status' lists them.

examples:
  tink replay train MODEL                        is it the same, bit for bit?
  tink replay train MODEL --to 40 --compare      up to step 40, with each result
  tink replay train MODEL --to 40 --output DIR   the adapter of step 40, for PEFT
  tink replay train MODEL --set learning_rate=1e-4 --set 3:grad_clip_norm=1
  tink replay train MODEL --drop MODEL:17        what if that job had not been?
  tink replay train MODEL --drop MODEL:17 --fork mended    and train on without it

exit status: 0 if everything is the same, and after a "what if"; 1 if something
differs by more than --tolerance; 2 if it cannot be replayed"""

PROGRAM = "tink replay train"
# Of the other settings none matters here, so none of them can be wrong.
VARIABLES = frozenset({"TINK_ARTIFACTS", "TINK_TRAINER_TOKEN", "TINK_CRASH_AT"})
# Whose key it is that a fork is published with: the SDK's name for it.
KEY = "TINKER_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the id of the training run")
    add_home(parser)
    parser.add_argument(
        "--to", type=positive, metavar="N", help="up to its N-th optimizer step (default: the last)"
    )
    parser.add_argument("--compare", action="store_true", help="print every result, and not only others")
    parser.add_argument(
        "--tolerance",
        type=_size,
        default=0.0,
        metavar="X",
        help="what a number may differ by, absolutely (default: 0, the same bits)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write the adapter after step N there, as PEFT reads it"
    )
    parser.add_argument(
        "--set",
        type=_change,
        action="append",
        default=[],
        dest="changes",
        metavar="[STEP:]NAME=VALUE",
        help="what if: another learning_rate, beta1, beta2, eps, weight_decay or grad_clip_norm, in one "
        "optimizer step or in all",
    )
    parser.add_argument(
        "--drop", action="append", default=[], metavar="JOB", help="what if: without this job"
    )
    parser.add_argument(
        "--fork",
        metavar="NAME",
        help="make the state after step N, weights and optimizer, one that the running worker knows: "
        "tinker://MODEL/weights/NAME, to train on from (TINKER_API_KEY)",
    )
    parser.add_argument(
        "--from-start",
        action="store_true",
        help="from the first operation or not at all, where requests that it needs were pruned",
    )
    parser.add_argument(
        "--trainer",
        metavar="URL",
        help="a fresh training server that you have started for this (TINK_TRAINER_TOKEN)",
    )
    parser.add_argument(
        "--artifacts",
        type=Path,
        metavar="DIR",
        help="of --trainer, as it is seen here: for saved states that are loaded, and for --output",
    )
    parser.add_argument(
        "--format", choices=("text", "json"), default="text", help="how to print (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def _size(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return number


def _change(text: str) -> Change:
    try:
        return Change.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class Plan(msgspec.Struct, frozen=True):
    """What the journal says of the replay, before anything is started. `artifacts`: of the run."""

    schedule: Schedule
    served: TrainerStarted
    trainers: list[str]
    ledger: Ledger
    stored: set[str]
    artifacts: Path
    export: rows.Adapter | None


class Report(msgspec.Struct, frozen=True):
    """What came of it. `versions`: what of the server is other than it was, then and now. `seconds` are
    those of the operations, now and `recorded`. `others`: the files of the adapter that are not those of
    `plan.export`; None: not compared. `fork`: the address of the state that was made of it."""

    plan: Plan
    comparisons: list[Comparison]
    versions: dict[str, tuple[str, str]]
    seconds: float
    recorded: float
    tolerance: float
    output: Path | None
    others: list[str] | None
    fork: str | None

    @property
    def different(self) -> list[Comparison]:
        return [one for one in self.comparisons if one.exceeds(self.tolerance)]

    @property
    def status(self) -> int:
        # Where results may differ, files may too.
        others = self.tolerance <= 0 and bool(self.others)
        return int(not self.plan.schedule.edits and (others or bool(self.different)))


def run(arguments: argparse.Namespace) -> int:
    configure_logs("error")
    with readable_home(arguments.home) as home:
        return _run(arguments, home)


def _run(arguments: argparse.Namespace, home: Home) -> int:
    only = VARIABLES
    if bundle.about(home) is not None:
        only = VARIABLES - {"TINK_ARTIFACTS"}  # it has its own
    settings = Settings.load(os.environ, only=only, home=home.root)
    _check(arguments, home, settings)
    with (
        open_recording(home) as recording,
        tempfile.TemporaryDirectory(prefix="tink-replay-") as folder,
    ):
        plan = _plan(arguments, recording, settings)
        _say_what_is_left_out(plan.schedule, plan.stored)
        report = trio.run(_replay, arguments, plan, recording, settings, Path(folder), home)
    tell = _tell_json if arguments.format == "json" else _tell
    tell(report, arguments.compare)
    return report.status


def _check(arguments: argparse.Namespace, home: Home, settings: Settings) -> None:
    """What is wrong with the options, before anything is read."""
    if arguments.output is not None:
        arguments.output = arguments.output.resolve()
        adapter.check_free(arguments.output, home.root)
    if arguments.fork is not None:
        ids.check_name(arguments.fork)
        if arguments.trainer is not None and arguments.artifacts is None:
            raise UserError("--fork with --trainer needs --artifacts DIR, the folder of that trainer")
    if arguments.trainer is None:
        if arguments.artifacts is not None:
            raise UserError("--artifacts is the folder of a --trainer: the replay's own has one of its own")
        return
    if not is_origin(arguments.trainer):
        raise UserError(f"--trainer {arguments.trainer}: a URL such as http://127.0.0.1:5000 is needed")
    if arguments.artifacts is None:
        if arguments.output is not None:
            raise UserError("--output with --trainer needs --artifacts DIR, the folder of that trainer")
    elif arguments.artifacts.resolve() == settings.artifact_root.resolve():
        raise UserError(f"--artifacts {arguments.artifacts} is the run's own: give the trainer another one")


# -- what is to be done -----------------------------------------------------------------------------


def _plan(arguments: argparse.Namespace, recording: Recording, settings: Settings) -> Plan:
    journal, model_id = recording.journal, arguments.model
    model = queries.model(journal, model_id)
    if model is None:
        raise UserError(f"there is no model {model_id} in this journal: 'tink status' lists them")
    served = store.last_trainer(journal)
    if served is None:
        raise UserError("no training server has ever answered in this journal: there is nothing to replay")
    artifacts = settings.artifact_root
    left = remains(recording, artifacts, model)
    made = schedule(
        left.jobs,
        left.snapshots,
        left.lost,
        model_id=model_id,
        to=arguments.to,
        from_start=arguments.from_start,
        edits=Edits(tuple(arguments.changes), frozenset(arguments.drop)),
    )
    if made.directories and arguments.trainer is not None and arguments.artifacts is None:
        raise UserError("saved states are loaded: pass --artifacts DIR, the folder of that trainer")
    ledger = Ledger()
    ledger.put("models", model)
    if made.edits.changes:
        _try(made, recording, ledger)
    exports = queries.exports(journal, model_id)
    export = next((one for one in exports if one.job_id == made.export), None)
    return Plan(made, served, queries.trainers(journal), ledger, left.stored, artifacts, export)


def _try(made: Schedule, recording: Recording, ledger: Ledger) -> None:
    """UserError for a change of the optimizer that cannot be: before anything is started."""
    for turn in made.turns:
        if turn.filler is None and turn.job.op == "optim_step":
            turn.operation(recording.request(turn.job), ledger, made.edits)


def _say_what_is_left_out(made: Schedule, stored: set[str]) -> None:
    """Before it begins."""
    if made.start is not None:
        write_line(
            f"{PROGRAM}: begins with the snapshot behind operation {made.start.op_no} (step {made.begun}): "
            f"{made.because}"
        )
    pruned = [turn for turn in made.turns if turn.filler is not None and turn.job.op == "forward"]
    pruned = [turn for turn in pruned if turn.job.state == "done" and turn.filler != "dropped"]
    if pruned:
        write_line(f"{PROGRAM}: {len(pruned)} forward left out, which changed nothing: {pruned[0].filler}")
    if not made.edits and (results := pruned_results(made.turns, stored)):
        write_line(
            f"{PROGRAM}: {results} of the results were pruned: their hashes tell if they are the same, "
            "and not by how much they differ"
        )


# -- doing it ---------------------------------------------------------------------------------------


async def _replay(
    arguments: argparse.Namespace,
    plan: Plan,
    recording: Recording,
    settings: Settings,
    folder: Path,
    home: Home,
) -> Report:
    world = World()
    async with _worker(arguments, plan, home, world) as worker:
        with _progress(len(plan.schedule.turns)) as advance:
            async with _server(arguments, plan, settings, folder, world) as trainer:
                versions = server.differences(plan.served, trainer.info)
                for name, (then, now) in versions.items():
                    write_line(f"{PROGRAM}: another {name} than in the run: {then} -> {now}")
                if trainer.artifacts is not None:
                    copies = plan.artifacts, plan.schedule.directories, trainer.artifacts
                    await world.run_sync(manifest.copy, *copies)
                rerun = Rerun(
                    plan.schedule, trainer, recording, plan.ledger, plan.stored, world, ended=advance
                )
                await rerun.run()
                others = await _adapter(arguments.output, plan, trainer, rerun, world)
                if worker is not None and trainer.artifacts is not None:
                    await _fork(worker, trainer.artifacts / await rerun.save(), plan, world)
    return Report(
        plan=plan,
        comparisons=rerun.comparisons,
        versions=versions,
        seconds=rerun.seconds,
        recorded=rerun.recorded_seconds,
        tolerance=arguments.tolerance,
        output=arguments.output,
        others=others,
        fork=None if worker is None else str(worker.address),
    )


def _worker(
    arguments: argparse.Namespace, plan: Plan, home: Home, world: World
) -> AbstractAsyncContextManager[fork.Worker | None]:
    """Of a fork: what it may refuse is known before anything is started."""
    if arguments.fork is None:
        return nullcontext()
    record = home.worker_record()
    if record is None:
        raise UserError("--fork needs the worker of this home to run: start it with 'tink serve'")
    key = os.environ.get(KEY, "")
    return fork.connect(record.url, key, plan.schedule.model_id, arguments.fork, world)


def _server(
    arguments: argparse.Namespace, plan: Plan, settings: Settings, folder: Path, world: World
) -> AbstractAsyncContextManager[Server]:
    if arguments.trainer is None:
        return server.own_server(plan.served, folder, settings.crash_at, world)
    return server.other_server(
        arguments.trainer, settings.trainer_token, arguments.artifacts, plan.trainers, world
    )


async def _adapter(
    output: Path | None, plan: Plan, trainer: Server, rerun: Rerun, world: World
) -> list[str] | None:
    """Writes the adapter to `output`. Returns which of its files are not what the run exported then; None
    if it did not."""
    if trainer.artifacts is None or (output is None and plan.export is None):
        return None
    path, made = await rerun.export()
    if output is not None:
        names = [file.name for file in made]
        await world.run_sync(adapter.publish, trainer.artifacts / path, names, output)
    return None if plan.export is None else adapter.others(plan.export.files, made)


async def _fork(worker: fork.Worker, source: Path, plan: Plan, world: World) -> None:
    fork_id = world.new_id()
    await world.run_sync(fork.stage, source, plan.artifacts, fork_id)
    try:
        await worker.publish(fork_id, plan.schedule)
    finally:
        fork.unstage(plan.artifacts, fork_id)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    with bar(TimeElapsedColumn()) as progress:
        task = progress.add_task("replay", total=total)
        yield lambda: progress.advance(task)


# -- telling ----------------------------------------------------------------------------------------


def _tell_json(report: Report, _every: bool) -> None:
    made, export = report.plan.schedule, report.plan.export
    different = report.different
    printing.print_document(
        {
            "model_id": made.model_id,
            "step": made.step,
            "steps": made.steps,
            "operations": len(made.turns),
            "snapshot": None if made.start is None else made.start.snapshot_id,
            "what_if": bool(made.edits),
            "versions": report.versions,
            "tolerance": report.tolerance,
            "compared": len(report.comparisons),
            "different": None if made.edits else len(different),
            "first": None if made.edits or not different else different[0],
            "jobs": report.comparisons,
            "adapter": {
                "directory": None if report.output is None else str(report.output),
                "recorded": None if export is None else export.adapter_id,
                "other_files": report.others,
            },
            "fork": report.fork,
            "recorded_seconds": report.recorded,
            "seconds": report.seconds,
        }
    )


def _tell(report: Report, every: bool) -> None:
    made = report.plan.schedule
    console, facts = printing.console(), printing.facts()
    begins = "" if made.start is None else f", behind a snapshot of step {made.begun}"
    facts.add_row("model", printing.text(made.model_id))
    facts.add_row("replayed", f"to step {made.step} of {made.steps}: {len(made.turns)} operations{begins}")
    if made.edits:
        facts.add_row("what if", printing.text(", ".join(made.edits.said())))
    else:
        _tell_comparison(report, facts)
    if report.plan.export is not None and report.others is not None:
        like = f"others than ({', '.join(report.others)})" if report.others else "the same as"
        facts.add_row(
            "adapter", printing.text(f"{like} {report.plan.export.adapter_id}, which the run exported")
        )
    if report.output is not None:
        facts.add_row("written", printing.text(report.output))
    if report.fork is not None:
        facts.add_row("forked", printing.text(report.fork))
        go_on = f"create_training_client_from_state_with_optimizer({report.fork!r})"
        facts.add_row("train on", printing.text(go_on))
    facts.add_row("speed", _speed(report))
    shown = report.comparisons if every or made.edits else report.different[:REPLAY_SHOWN]
    if shown:
        console.print(_table(shown, report.tolerance, compared=not made.edits))
        console.print()
    console.print(facts)


def _tell_comparison(report: Report, facts: Any) -> None:
    different, count = report.different, len(report.comparisons)
    near = "the same, bit for bit" if report.tolerance <= 0 else f"the same within {report.tolerance:g}"
    if not different:
        facts.add_row("results", f"{count} compared: {near}")
        return
    facts.add_row("results", f"{count} compared: {len(different)} differ, {count - len(different)} {near}")
    first = different[0]
    where = f"{first.job_id}, {first.op} of step {first.step}, operation {first.op_no}"
    facts.add_row("first", printing.text(f"{where}: {', '.join(_differs(first))}"))


def _differs(one: Comparison) -> Iterator[str]:
    if one.loss is not None:
        yield f"loss by {one.loss:.3g} ({one.recorded!r} recorded, {one.now!r} now)"
    if one.logprobs is not None:
        yield f"log-probabilities by up to {one.logprobs:.3g}"
    if one.metrics is not None:
        yield f"metrics by up to {one.metrics:.3g}"
    if one.detail is not None:
        yield one.detail


def _table(comparisons: list[Comparison], tolerance: float, *, compared: bool) -> Any:
    numbers = ("step", "op no", "recorded", "now", "loss", "logprobs", "metrics")
    made = printing.table("step", "op no", "job", "op", *numbers[2:], "", right=numbers)
    for one in comparisons:
        verdict = "same" if one.same else "differs" if one.exceeds(tolerance) else "near"
        made.add_row(
            str(one.step),
            str(one.op_no),
            printing.text(one.job_id),
            one.op,
            *("-" if value is None else f"{value:.6f}" for value in (one.recorded, one.now)),
            *("-" if value is None else f"{value:.3g}" for value in (one.loss, one.logprobs, one.metrics)),
            printing.text(one.detail) if one.detail else verdict if compared else "",
        )
    return made


def _speed(report: Report) -> str:
    then, now = printing.duration(report.recorded), printing.duration(report.seconds)
    ratio = f": {report.recorded / report.seconds:.2f}" if report.seconds else ""
    return f"original {then}, replay {now}{ratio}"
