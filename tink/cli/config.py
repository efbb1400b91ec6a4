"""`tink config`: the settings as `tink serve` would have them, and what is wrong with them."""

from __future__ import annotations

import argparse
import os
from dataclasses import Field, fields
from typing import Any

import msgspec

from tink.cli import printing, serve
from tink.cli.options import add_home
from tink.logs import write_line
from tink.settings import Settings

HELP = "the settings, where each comes from, and what is wrong"
DESCRIPTION = """\
Prints every setting as 'tink serve' would have it here, and which variable set
it. Keys are not shown. What is wrong goes to standard error, a line each."""
EPILOG = """\
examples:
  tink config
  USE_VLLM=true VLLM_BASE_URL=http://gpu-1:8000 tink config
  tink config --json

exit status: 0; 2 if something is wrong, and 'tink serve' would not start"""

HIDDEN = "***"


class Setting(msgspec.Struct, kw_only=True):
    """`source`: the variable or option that set it; None: it is the default."""

    name: str
    value: str | None
    source: str | None
    help: str


class Config(msgspec.Struct, kw_only=True):
    mode: str
    settings: list[Setting]
    problems: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_home(parser, of="everything")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    reading = Settings.read(os.environ, home=arguments.home)
    settings = reading.settings
    found = Config(
        mode=settings.routes.mode,
        settings=[
            Setting(
                name=field.metadata["names"][0],
                value=_value(settings, field),
                source=reading.sources.get(field.name),
                help=_help(field),
            )
            for field in fields(Settings)
        ],
        problems=reading.problems or list(serve.problems(settings, no_auth=False)),
    )
    if arguments.json:
        printing.print_document(found)
    else:
        _print(found)
        for problem in found.problems:
            write_line(f"tink config: {problem}")
    return 2 if found.problems else 0


def _help(field: Field[Any]) -> str:
    text, otherwise = field.metadata["help"], field.metadata["otherwise"]
    return text if otherwise == "none" else f"{text} (default: {otherwise})"


def _value(settings: Settings, field: Field[Any]) -> str | None:
    value = getattr(settings, field.name)
    if field.name == "artifacts":
        value = settings.artifact_root
    if value is None or value == "":
        return None
    if field.metadata["secret"]:
        return HIDDEN
    return str(value).lower() if isinstance(value, bool) else str(value)


def _print(config: Config) -> None:
    facts = printing.facts()
    facts.add_row("mode", printing.text(config.mode))
    table = printing.table("SETTING", "VALUE", "FROM", "WHAT IT IS")
    for one in config.settings:
        table.add_row(one.name, printing.text(one.value), one.source or "default", printing.text(one.help))
    console = printing.console(printing.LIST_COLUMNS)
    console.print(facts)
    console.print()
    console.print(table)
