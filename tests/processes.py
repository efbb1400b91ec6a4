"""Other processes: one that serves for a while; and looking at others, for tests that must leave none
behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

READY_SECONDS = 60.0


class Serving(NamedTuple):
    """`said`: what is in its ready file."""

    pid: int
    said: bytes


@contextmanager
def serving(module: str, ready: Path, *arguments: str) -> Iterator[Serving]:
    """A process of `module`, from when it has written that file, its first argument, until the end of the
    block, when it is killed. What it prints is beside the file."""
    log = ready.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(ready), *arguments], stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{module} did not come up:\n{log.read_text()}")
            time.sleep(0.02)
        yield Serving(process.pid, ready.read_bytes())
    finally:
        process.kill()
        process.wait()


def processes_of(folder: Path) -> list[str]:
    """Command lines that name the folder."""
    lines = [b" ".join(arguments).decode(errors="replace") for arguments in _running().values()]
    return [line for line in lines if str(folder) in line]


def trainers_of(home: Path) -> list[int]:
    """The processes of the training server of this home: itself, and the parent that it was forked from."""
    ready = os.fsencode(home / "trainer.json")
    return [pid for pid, arguments in _running().items() if ready in arguments]


def server_of(home: Path) -> int | None:
    """The training server itself, if one runs."""
    try:
        pid = int(json.loads((home / "trainer.json").read_text())["pid"])
    except (OSError, ValueError):
        return None
    return pid if pid in trainers_of(home) else None


def cpu_seconds(pid: int) -> float:
    """What it has used until now, without its children."""
    times = _stat(Path(f"/proc/{pid}/stat"))[11:13]
    return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")


def kill_trainers(home: Path) -> None:
    """All of them; the parent may have forked another one meanwhile."""
    while pids := trainers_of(home):
        for pid in pids:
            kill(pid)


def children_of(pid: int) -> list[int]:
    """Of this one itself, not of its children."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            if int(_stat(entry)[1]) == pid:
                found.append(int(entry.parent.name))
    return found


def is_alive(pid: int) -> bool:
    """A zombie is dead: it only waits for its parent to look."""
    try:
        return _stat(Path(f"/proc/{pid}/stat"))[0] not in "ZX"
    except (OSError, IndexError):
        return False


def kill(pid: int) -> None:
    """kill -9, of one that may be dead by now."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _stat(path: Path) -> list[str]:
    """What follows the name, which may have any character in it: the state, the parent, and so on."""
    return path.read_text().rpartition(")")[2].split()


def _running() -> dict[int, list[bytes]]:
    """pid -> arguments."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            found[int(entry.parent.name)] = entry.read_bytes().split(b"\0")
    return found


# Of Linux's capabilities (linux/capability.h).
NET_ADMIN, SYS_ADMIN = 12, 21


def may(*capabilities: int) -> bool:
    """Whether this process may do what takes these: root in a container may not everything."""
    status = Path("/proc/self/status").read_text()
    effective = int(re.search(r"^CapEff:\s*(\w+)", status, re.M)[1], 16)  # type: ignore[index]
    return all(effective >> one & 1 for one in capabilities)
