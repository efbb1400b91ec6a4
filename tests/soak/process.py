"""A soak's worker as a process: what it is told to do, and what is seen of it from outside."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from tests.null_servers import Ports
from tests.processes import cpu_seconds, serving
from tests.soak.worker import Done, Opened, Options
from tink.home import Home

LOOK_SECONDS = 0.5
END_SECONDS = 60.0


class Look(NamedTuple):
    """`rss`, and in the file of `bodies` what is used: MB. `handles`: open files and sockets.
    `directories`: of the artifact folder, all of them."""

    rss: float
    handles: int
    bodies: float
    directories: int


class Turn(NamedTuple):
    """What came of so many jobs. `cpu`: seconds of the process. `journal`: how much it has grown, in bytes.
    `looks`: from outside, meanwhile."""

    jobs: int
    seconds: float
    cpu: float
    journal: int
    done: Done
    looks: list[Look]


class SoakWorker:
    def __init__(self, options: Options) -> None:
        """Returns when its journal is open."""
        self.home = Home(Path(options.home))
        self._log = self.home.root.with_name(f"{self.home.root.name}.log")
        arguments = [sys.executable, "-m", "tests.soak.worker", msgspec.json.encode(options).decode()]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        self.opened = msgspec.json.decode(self._answer(), type=Opened).seconds

    def work(self, jobs: int) -> Turn:
        """Has so many jobs done."""
        began, cpu, journal = time.monotonic(), self._cpu(), self._journal()
        with self._watched() as looks:
            done = self._tell(f"{jobs}\n")
        seconds, cpu = time.monotonic() - began, self._cpu() - cpu
        return Turn(jobs, seconds, cpu, self._journal() - journal, done, looks)

    def end(self) -> Done:
        """Its sessions end, and so does it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        done = msgspec.json.decode(self._answer(), type=Done)
        if self._process.wait(timeout=END_SECONDS) != 0:
            raise self._failed()
        return done

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _tell(self, line: str) -> Done:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode())
        self._process.stdin.flush()
        return msgspec.json.decode(self._answer(), type=Done)

    def _answer(self) -> bytes:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failed()
        return line

    def _failed(self) -> SystemExit:
        return SystemExit(f"the worker has failed:\n{self._log.read_text()[-4000:]}")

    # -- from outside -------------------------------------------------------------------------------

    @contextmanager
    def _watched(self) -> Iterator[list[Look]]:
        looks: list[Look] = []
        over = threading.Event()

        def watch() -> None:
            with (
                closing(_reader(self.home.bodies)) as bodies,
                closing(_reader(self.home.journal)) as journal,
            ):
                while not over.wait(LOOK_SECONDS if looks else 0.0):
                    looks.append(self._look(bodies, journal))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield looks
        finally:
            over.set()
            watcher.join()

    def _look(self, bodies: sqlite3.Connection, journal: sqlite3.Connection) -> Look:
        proc = Path(f"/proc/{self._process.pid}")
        pages = int((proc / "statm").read_text().split()[1])
        return Look(
            rss=pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
            handles=len(os.listdir(proc / "fd")),
            bodies=(_used(bodies) + _short(journal)) / 1e6,
            directories=sum(len(inside) for _, inside, _ in os.walk(self.home.artifacts)),
        )

    def _cpu(self) -> float:
        return cpu_seconds(self._process.pid)

    def _journal(self) -> int:
        """With what is not in the file yet, but in the log beside it. Without what does not stay."""
        with closing(_reader(self.home.journal)) as journal:
            return _used(journal) - _short(journal)


def _reader(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{path}?mode=ro", uri=True)


def _used(connection: sqlite3.Connection) -> int:
    """Bytes of the file that are not free."""
    size, pages, free = (
        int(connection.execute(f"PRAGMA {name}").fetchone()[0])
        for name in ("page_size", "page_count", "freelist_count")
    )
    return size * (pages - free)


def _short(journal: sqlite3.Connection) -> int:
    """Bytes of the pages that have short bodies."""
    query = "SELECT name FROM sqlite_master WHERE tbl_name = 'short_bodies'"
    trees = journal.execute(query).fetchall()
    sizes = [journal.execute("SELECT sum(pgsize) FROM dbstat WHERE name = ?", tree) for tree in trees]
    return sum(int(size) for rows in sizes for (size,) in rows)


@contextmanager
def worker(options: Options, *, http: bool = False) -> Iterator[SoakWorker]:
    """`http`: with servers of its own."""
    home = Home(Path(options.home))
    home.make()
    with ExitStack() as stack:
        if http:
            ready = home.root / "servers.json"
            servers = stack.enter_context(serving("tests.null_servers", ready, str(home.artifacts)))
            options = msgspec.structs.replace(options, ports=msgspec.json.decode(servers.said, type=Ports))
        running = SoakWorker(options)
        stack.callback(running.kill)
        yield running
