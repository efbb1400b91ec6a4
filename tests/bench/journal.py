"""What an append to the journal costs: real files, synced at each commit.

Writers append one event after the other, each waiting until it is durable. The baselines: for the chain
of hashes, the same with hashes that cost nothing; for a journal that is audited meanwhile (`tink audit
--watch 1` in another process), the same with nobody asking.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest.mock import patch

import trio

from tests.bench.figures import Figure
from tink.domain.events import ClientFailed, SessionCreated, Subject
from tink.home import Home
from tink.journal import chain
from tink.journal.journal import Journal
from tink.world import World

SUMMARY = "appends to the journal: their rate, their CPU, the price of hashes and of audits"

WRITERS = (1, 16, 256)
WHO = Subject(tenant="bench", session_id="s", model_id="s:train:0", job_id="s:train:0:1")
EVENT = ClientFailed(exception_type="builtins.ValueError")


class Appended(NamedTuple):
    """Of one event: events a second, and microseconds of CPU in this process."""

    rate: float
    cpu: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--events", type=int, default=20_000, help="events at 256 writers (20000)")
    parser.add_argument("--runs", type=int, default=5, help="runs of each; the median counts (5)")


def run(arguments: argparse.Namespace) -> Iterator[Figure]:
    for writers in WRITERS:
        events = max(500, arguments.events * writers // max(WRITERS))
        # In turn: the machine may get slower or faster meanwhile.
        some = [(append(writers, events), append(writers, events, hashed=False)) for _ in _times(arguments)]
        with_hash, without = ([pair[which] for pair in some] for which in (0, 1))
        yield Figure(f"journal_{writers}_rate", _rate(with_hash), "events/s", _rate(without))
        yield Figure(f"journal_{writers}_cpu", _cpu(with_hash), "us", _cpu(without))
    events = arguments.events
    some = [(append(16, events, audited=True), append(16, events)) for _ in _times(arguments)]
    asked, alone = ([pair[which] for pair in some] for which in (0, 1))
    yield Figure("journal_audited_rate", _rate(asked), "events/s", _rate(alone))
    yield Figure("journal_audited_cpu", _cpu(asked), "us", _cpu(alone))


def _times(arguments: argparse.Namespace) -> range:
    return range(arguments.runs)


def _rate(some: list[Appended]) -> float:
    return median(one.rate for one in some)


def _cpu(some: list[Appended]) -> float:
    return median(one.cpu for one in some)


def append(writers: int, events: int, *, hashed: bool = True, audited: bool = False) -> Appended:
    with tempfile.TemporaryDirectory(prefix="tink-bench-") as folder:
        home = Home(Path(folder))
        home.make()
        if hashed:
            return trio.run(_append, home, writers, events, audited)
        with patch.object(chain, "link", lambda before, row: before):
            return trio.run(_append, home, writers, events, audited)


async def _append(home: Home, writers: int, events: int, audited: bool) -> Appended:
    async with Journal.open(home, World(), version="bench", settings_digest="") as journal:
        await journal.append((Subject(tenant="bench", session_id="s"), SessionCreated()))

        async def write() -> None:
            for _ in range(events // writers):
                await journal.append((WHO, EVENT))

        with _auditor(home, audited):
            began, cpu = time.monotonic(), time.process_time()
            async with trio.open_nursery() as nursery:
                for _ in range(writers):
                    nursery.start_soon(write)
            seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    done = events // writers * writers
    return Appended(done / seconds, cpu / done * 1e6)


@contextmanager
def _auditor(home: Home, asks: bool) -> Iterator[None]:
    """Somebody who asks what went wrong, and once more as soon as it is answered."""
    if not asks:
        yield
        return
    command = [sys.executable, "-m", "tink.cli.main", "audit", "lost-time", "--home", str(home.root)]
    with subprocess.Popen(
        [*command, "--watch", "1"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as asker:
        assert asker.stdout is not None
        asker.stdout.readline()  # it is up
        reader = subprocess.Popen(["cat"], stdin=asker.stdout, stdout=subprocess.DEVNULL)
        try:
            yield
        finally:
            asker.kill()
            reader.wait()
