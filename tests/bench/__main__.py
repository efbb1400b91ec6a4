"""Measures Tink on this machine.

    python -m tests.bench NAME [OPTIONS]

A bench is a module here with SUMMARY, add_arguments(parser) and run(arguments), which yields its figures.
One row for each: name, value, unit, and in brackets the baseline and how many times as much it is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from tests.bench import (
    accept,
    affinity,
    audit,
    calls,
    journal,
    lane,
    overhead,
    polls,
    recovery,
    replay,
    rerun,
    samples,
    sampling,
)

BENCHES: dict[str, ModuleType] = {
    "accept": accept,
    "affinity": affinity,
    "audit": audit,
    "calls": calls,
    "journal": journal,
    "lane": lane,
    "overhead": overhead,
    "polls": polls,
    "recovery": recovery,
    "replay": replay,
    "rerun": rerun,
    "samples": samples,
    "sampling": sampling,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/bench", description="Measures Tink on this machine.")
    benches = parser.add_subparsers(required=True, metavar="NAME", title="benches")
    for name, bench in BENCHES.items():
        options = benches.add_parser(name, help=bench.SUMMARY, description=bench.__doc__)
        options.formatter_class = argparse.RawDescriptionHelpFormatter
        bench.add_arguments(options)
        options.set_defaults(run=bench.run)
    chosen = parser.parse_args(arguments)
    for figure in chosen.run(chosen):
        print(figure, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
