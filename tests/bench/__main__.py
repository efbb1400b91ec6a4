"""Measures Tink on this machine.

    python -m tests.bench NAME [OPTIONS]

A bench is a module here with SUMMARY, add_arguments(parser) and run(arguments), which yields its figures.
One row for each: name, value, unit, and in brackets the baseline and how many times as much it is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType

from tests.bench import (
    accept,
    affinity,
    audit,
    calls,
    costs,
    journal,
    lane,
    overhead,
    polls,
    recovery,
    redo,
    replay,
    rerun,
    samples,
    sampling,
    survive,
    trainer,
)

BENCHES: dict[str, ModuleType] = {
    "accept": accept,
    "affinity": affinity,
    "audit": audit,
    "calls": calls,
    "costs": costs,
    "journal": journal,
    "lane": lane,
    "overhead": overhead,
    "polls": polls,
    "recovery": recovery,
    "redo": redo,
    "replay": replay,
    "rerun": rerun,
    "samples": samples,
    "sampling": sampling,
    "survive": survive,
    "trainer": trainer,
}


# What `all` gives to a bench: ten million events would take an hour, and a database of its own is there.
OPTIONS = {"audit": ["--events", "1000000"], "journal": ["--postgres"]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/bench", description="Measures Tink on this machine.")
    benches = parser.add_subparsers(required=True, metavar="NAME", title="benches")
    for name, bench in BENCHES.items():
        options = benches.add_parser(name, help=bench.SUMMARY, description=bench.__doc__)
        options.formatter_class = argparse.RawDescriptionHelpFormatter
        bench.add_arguments(options)
        options.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
        options.set_defaults(run=bench.run, name=name)
    options = benches.add_parser("all", help="every one of these, half an hour")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options.set_defaults(name="all")
    chosen = parser.parse_args(arguments)
    if chosen.name == "all":
        return run_all(chosen.json)
    told: list[dict[str, object]] = []
    for figure in chosen.run(chosen):
        print(figure, flush=True)
        told.append({"bench": chosen.name, **figure._asdict()})
    if chosen.json is not None:
        write(chosen.json, told)
    return 0


def run_all(file: Path | None) -> int:
    """Each in a process of its own: an SDK client that one has used goes on calling its server."""
    failed: list[str] = []
    told: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="tink-bench-") as folder:
        for name in BENCHES:
            figures = Path(folder) / "figures.json"
            command = [sys.executable, "-m", "tests.bench", name, *OPTIONS.get(name, [])]
            if subprocess.run([*command, "--json", str(figures)]).returncode == 0:
                told += json.loads(figures.read_text())["figures"]
            else:
                failed.append(name)
    if file is not None:
        write(file, told)
    if failed:
        print(f"tools/bench: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def write(file: Path, figures: list[dict[str, object]]) -> None:
    file.write_text(json.dumps({"machine": machine(), "figures": figures}, indent=1) + "\n")


def machine() -> dict[str, object]:
    """Where they were measured, and by which versions."""
    cpus = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    names = ("tink", "trio", "uvicorn", "httptools", "uvloop", "SQLAlchemy", "httpx", "tinker", "torch")
    return {
        "processor": cpus[0].partition(": ")[2] if cpus else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        **{name: metadata.version(name) for name in names},
    }


if __name__ == "__main__":
    sys.exit(main())
