"""`tink doctor`: what is wrong with the set-up, and what mends it."""

from __future__ import annotations

import argparse
import os

import msgspec

from tink.cli import printing, serve
from tink.cli.external import external
from tink.cli.options import add_home
from tink.doctor.findings import Finding
from tink.doctor.look import look
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
    add_home(parser, of="everything")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    # What the parts that are used here tell a worker's log is told by the findings.
    configure_logs("error")
    reading = Settings.read(os.environ, home=arguments.home)
    settings = reading.settings
    problems = [] if reading.problems else list(serve.problems(settings, no_auth=False))
    found = list(look(reading, problems, external(settings), World()))
    report = Report(ok=all(finding.state != "wrong" for finding in found), findings=found)
    if arguments.json:
        printing.print_document(report)
    else:
        _print(report)
    return 0 if report.ok else 1


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
