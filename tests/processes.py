"""Looking at other processes, for tests that must leave none behind."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path


def processes_of(folder: Path) -> list[str]:
    """Command lines that name the folder."""
    lines = [b" ".join(arguments).decode(errors="replace") for arguments in _running().values()]
    return [line for line in lines if str(folder) in line]


def trainers_of(home: Path) -> list[int]:
    """The training servers that were started for this home."""
    ready = os.fsencode(home / "trainer.json")
    return [pid for pid, arguments in _running().items() if ready in arguments]


def kill(pid: int) -> None:
    """kill -9, of one that may be dead by now."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _running() -> dict[int, list[bytes]]:
    """pid -> arguments."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            found[int(entry.parent.name)] = entry.read_bytes().split(b"\0")
    return found
