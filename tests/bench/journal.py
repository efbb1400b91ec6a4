"""What an append to the journal costs: real files, synced at each commit.

Writers append one event after the other, each waiting until it is durable. The baselines: rows of the
same size, written by the database's own driver with `executemany`, as many in a transaction as there are
writers; for the chain of hashes, the same with hashes that cost nothing; for a journal that is audited
meanwhile (`tink audit --watch 1` in another process), the same with nobody asking. With `--postgres` on a
PostgreSQL beside it too, which it brings.
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
from unittest.mock import patch

import trio

from tests import postgres
from tests.bench import raw
from tests.bench.figures import Figure
from tests.bench.raw import Written
from tink.domain.events import ClientFailed, SessionCreated, Subject
from tink.home import Home
from tink.journal import chain
from tink.journal.journal import Journal
from tink.world import World

SUMMARY = "appends to the journal: their rate, their CPU, the price of hashes and of audits"

WRITERS = (1, 16, 256)
WHO = Subject(tenant="bench", session_id="s", model_id="s:train:0", job_id="s:train:0:1")
EVENT = ClientFailed(exception_type="builtins.ValueError")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--events", type=int, default=20_000, help="events at 256 writers (20000)")
    parser.add_argument("--runs", type=int, default=5, help="runs of each; the median counts (5)")
    parser.add_argument("--postgres", action="store_true", help="PostgreSQL too")


def run(arguments: argparse.Namespace) -> Iterator[Figure]:
    for writers in WRITERS:
        events = max(500, arguments.events * writers // max(WRITERS))
        # In turn: the machine may get slower or faster meanwhile.
        some = [
            (append(writers, events), append(writers, events, hashed=False), raw.sqlite(writers, events))
            for _ in _times(arguments)
        ]
        found, without, driver = ([each[which] for each in some] for which in (0, 1, 2))
        yield Figure(f"journal_{writers}_rate", _rate(found), "events/s", _rate(driver))
        yield Figure(f"journal_{writers}_cpu", _cpu(found), "us", _cpu(driver))
        yield Figure(f"journal_{writers}_hashed_cpu", _cpu(found), "us", _cpu(without))
    events = arguments.events
    some = [(append(16, events, audited=True), append(16, events)) for _ in _times(arguments)]
    asked, alone = ([pair[which] for pair in some] for which in (0, 1))
    yield Figure("journal_audited_rate", _rate(asked), "events/s", _rate(alone))
    yield Figure("journal_audited_cpu", _cpu(asked), "us", _cpu(alone))
    if arguments.postgres:
        with postgres.running() as server:
            yield from _on_postgres(server, arguments)


def _on_postgres(server: postgres.PostgresServer, arguments: argparse.Namespace) -> Iterator[Figure]:
    for writers in WRITERS:
        events = max(500, arguments.events * writers // max(WRITERS))
        some = []
        for _ in _times(arguments):
            one, other = server.create_database(), server.create_database()
            some.append((append(writers, events, url=one), raw.postgres(writers, events, other)))
        found, driver = ([each[which] for each in some] for which in (0, 1))
        yield Figure(f"journal_postgres_{writers}_rate", _rate(found), "events/s", _rate(driver))
        yield Figure(f"journal_postgres_{writers}_cpu", _cpu(found), "us", _cpu(driver))


def _times(arguments: argparse.Namespace) -> range:
    return range(arguments.runs)


def _rate(some: list[Written]) -> float:
    return median(one.rate for one in some)


def _cpu(some: list[Written]) -> float:
    return median(one.cpu for one in some)


def append(
    writers: int, events: int, *, hashed: bool = True, audited: bool = False, url: str = ""
) -> Written:
    with tempfile.TemporaryDirectory(prefix="tink-bench-") as folder:
        home = Home(Path(folder), url)
        home.make()
        if hashed:
            return trio.run(_append, home, writers, events, audited)
        with patch.object(chain, "link", lambda before, row: before):
            return trio.run(_append, home, writers, events, audited)


async def _append(home: Home, writers: int, events: int, audited: bool) -> Written:
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
    return Written(done / seconds, cpu / done * 1e6)


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
