"""How long `tink serve` takes to serve again, by the length of its journal.

Makes a fresh home and some with ever longer histories and many open jobs, and starts real workers on them,
in turn with the fresh one, each with its embedded trainer starting beside it, as after a crash of both. A
worker is killed once it has answered, so that every start finds the same journal, but for the event of the
start itself. The baseline is the fresh home: what every start costs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from typing import NamedTuple

from tests.bench import history
from tests.bench.figures import Figure
from tests.live import LiveServer
from tests.processes import cpu_seconds
from tink.home import Home
from tools.ports import free_port

SUMMARY = "the time to serve again after a crash, with a long journal"
GIVE_UP_SECONDS = 300.0
LOOK_SECONDS = 0.005


class Start(NamedTuple):
    """Until the first answer: `seconds` since the process began, `cpu` seconds of it, `rss` in MB."""

    seconds: float
    cpu: float
    rss: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--events",
        type=int,
        nargs="+",
        default=[10_000, 100_000, 1_000_000],
        help="events in the journals (10000 100000 1000000)",
    )
    parser.add_argument("--open", type=int, default=10_000, help="open jobs in each (10000)")
    parser.add_argument("--starts", type=int, default=7, help="starts of each home; the median counts (7)")
    parser.add_argument(
        "--homes", type=Path, help="keep the homes in this folder; those there are used again"
    )


def run(arguments: argparse.Namespace) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory(prefix="tink-bench-") as folder:
        fresh = Home(Path(folder) / "fresh")
        history.write(fresh, wanted=0, open_jobs=0, until=time.time())
        for events in arguments.events:
            long = Home((arguments.homes or Path(folder)) / f"{events}")
            if not long.journal.exists():
                began = time.monotonic()
                written = history.write(long, wanted=events, open_jobs=arguments.open, until=time.time())
                seconds = time.monotonic() - began
                yield Figure(f"{events}_events_written", written / seconds, "events/s")
            for figure in compared(fresh, long, arguments.starts):
                yield figure._replace(name=f"{events}_{figure.name}")


def compared(fresh: Home, long: Home, times: int) -> Iterator[Figure]:
    # In turn: the machine may get slower or faster meanwhile.
    starts = [(start(fresh), start(long)) for _ in range(times)]
    bases, founds = zip(*starts, strict=True)
    for name, unit in (("seconds", "s"), ("cpu", "s"), ("rss", "MB")):
        found, base = (median(getattr(one, name) for one in some) for some in (founds, bases))
        yield Figure(f"serve_{name}", found, unit, base)
    yield Figure(
        "serve_slowest", max(found.seconds for found in founds), "s", max(b.seconds for b in bases)
    )
    yield Figure("check_seconds", check(long), "s", check(fresh))


def start(home: Home) -> Start:
    """One start of a worker on the home, up to its first answer; then it is gone, and its trainer too."""
    server = LiveServer(home.root)
    server.port = free_port()
    began = time.monotonic()
    server.start(wait=False)
    process = server.process
    assert process is not None
    try:
        while not _answers(server.port):
            if process.poll() is not None or time.monotonic() - began > GIVE_UP_SECONDS:
                raise SystemExit(f"tink serve did not come up:\n{server.output()}")
            time.sleep(LOOK_SECONDS)
        seconds = time.monotonic() - began
        cpu = cpu_seconds(process.pid)
        pages = Path(f"/proc/{process.pid}/statm").read_text().split()[1]
        return Start(seconds, cpu, int(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6)
    finally:
        server.kill()
        _kill_all_of(home)


def check(home: Home) -> float:
    """Seconds of a whole `tink db check`, which must find nothing wrong."""
    began = time.monotonic()
    command = [sys.executable, "-m", "tink.cli.main", "db", "check", "--home", str(home.root)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def _answers(port: int) -> bool:
    """The worker listens early and answers when it serves: this waits for it in the meantime."""
    connection = HTTPConnection("127.0.0.1", port, timeout=GIVE_UP_SECONDS)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _kill_all_of(home: Home) -> None:
    """The trainer, however far its start has come: it may not have said yet that it runs."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            if b"tink.trainer" in arguments and os.fsencode(home.root) in arguments:
                os.kill(int(folder.name), signal.SIGKILL)
