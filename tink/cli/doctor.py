"""`tink doctor`: what is wrong with the set-up, and what mends it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import trio

from tink.cli import printing, probes, serve
from tink.cli.probes import WorkerStatus
from tink.cli.serving import external
from tink.doctor import machine
from tink.doctor.findings import Finding, ok, warning, wrong
from tink.doctor.servers import Servers
from tink.domain import rows
from tink.errors import StartupError
from tink.home import Home
from tink.journal import queries
from tink.journal.reader import open_journal
from tink.logs import configure_logs
from tink.settings import Settings
from tink.world import World

HELP = "what is wrong with the set-up, and what mends it"
DESCRIPTION = """\
Looks at what 'tink serve' would use here: the settings, the home and the
artifact folder, disk, journal, clock, versions, the port or the worker that has
it, and each training and vLLM server, whether it answers, serves the model that
is trained and takes adapters. Changes nothing. Works while the worker runs."""
EPILOG = """\
examples:
  tink doctor
  USE_MEGATRON=true USE_VLLM=true tink doctor
  tink doctor --json
  tink doctor && tink serve

exit status: 0 nothing is wrong (there may be warnings); 1 something is"""


class Report(msgspec.Struct, kw_only=True):
    """`ok`: nothing is wrong."""

    ok: bool
    findings: list[Finding]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--home", type=Path, help="folder of everything (TINK_HOME; default ~/.tink)")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    # What the parts that are used here tell a worker's log is told by the findings.
    configure_logs("error")
    found = list(look(arguments.home, World()))
    report = Report(ok=all(finding.state != "wrong" for finding in found), findings=found)
    if arguments.json:
        printing.print_document(report)
    else:
        _print(report)
    return 0 if report.ok else 1


def look(home: Path | None, world: World) -> Iterator[Finding]:
    reading = Settings.read(os.environ, home=home)
    settings = reading.settings
    problems = [] if reading.problems else list(serve.problems(settings, no_auth=False))
    yield from machine.settings(reading, problems)
    yield from machine.engine(settings)
    yield from machine.folders(settings)
    yield from machine.journal(Home(settings.home), world)
    yield machine.versions()
    yield from _worker(settings, world)
    if not reading.problems:
        yield from trio.run(Servers(settings, external(settings), world).look)


def _worker(settings: Settings, world: World) -> Iterator[Finding]:
    """The one that runs on the home; without one, whether its port can be had."""
    home = Home(settings.home)
    last = _last(home)
    worker, trainer = probes.probe(home, last, world)
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
    if not home.journal.is_file():
        return None
    try:
        with open_journal(home) as connection:
            return queries.last_incarnation(connection)
    except StartupError:  # it is a finding of its own
        return None


def _print(report: Report) -> None:
    table = printing.table("CHECK", "STATE", "WHAT")
    for finding in report.findings:
        text = printing.text(finding.detail)
        if finding.remedy:
            text += f"\n-> {printing.text(finding.remedy)}"
        table.add_row(finding.check, printing.state(finding.state), text)
    console = printing.console()
    console.print(table)
    wrong_ones = sum(finding.state == "wrong" for finding in report.findings)
    console.print()
    console.print("nothing is wrong" if report.ok else f"{wrong_ones} wrong")
