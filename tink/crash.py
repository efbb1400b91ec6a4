"""Named places at which a process of Tink kills itself when it is told to: how tests put a `kill -9`
exactly between two steps.

    TINK_CRASH_AT=worker.accepted:3 tink serve

The third time that the worker passes that point it ends by SIGKILL. Nothing is flushed, nobody is told;
one line on standard error says where. Never set it where the work matters.
"""

from __future__ import annotations

import os
import signal
from itertools import count

from tink.errors import StartupError, suggestion

# name -> what is so at that point, and what is not yet. The first word is the process that passes it.
POINTS = {
    "worker.opened": "the start is journaled; nothing is served",
    "worker.spawned": "a trainer was started; it has not said so",
    "worker.body": "a request's body is stored (a short one only in memory); its job is not journaled",
    "worker.accepted": "a job is journaled; its client was not told",
    "worker.started": "an attempt is journaled; the trainer was not called",
    "worker.answered": "the trainer has done a job; its answer is nowhere else",
    "worker.published": "an export or a saved state is published; it is not journaled",
    "worker.placed": "every sampling server has an adapter version; it is not journaled",
    "worker.result": "a job's result is stored (a short one only in memory); its end is not journaled",
    "worker.ended": "a job's end is journaled; those who wait were not told",
    "worker.restored": "a trainer has a snapshot back; what came behind it was not applied again",
    "worker.redone": "one operation was applied again; those behind it were not",
    "worker.snapshot-published": "a snapshot is published; it is not journaled",
    "worker.snapshot-journaled": "a snapshot is journaled; the one it replaces is not dropped",
    "worker.snapshot-dropped": "a snapshot is dropped in the journal; its files are there",
    "worker.bodies-pruned": "bodies are pruned in the journal; they are still stored",
    "worker.adopted": "a fork's files are in their place; it is not journaled",
    "worker.removing": "a directory is out of its place; its files are there",
    "trainer.bound": "the port is bound; the ready file is not written",
    "trainer.loading": "the ready file is written; the model is not loaded",
    "trainer.taken": "it is an operation's turn; nothing was computed",
    "trainer.forward": "the losses of a micro-batch are computed; its gradient is not",
    "trainer.micro-batch": "the gradient of one micro-batch is there; it is not the last one",
    "trainer.moments": "the new moments of an optimizer step are computed; its weights are not",
    "trainer.applied": "the model has changed; the operation's number and result are not kept",
    "trainer.kept": "number and result are kept; the worker was not told",
    "trainer.sampled": "a sample was drawn; the worker was not told",
    "trainer.file": "one file of a directory to be published is written; others are not",
    "trainer.synced": "all files are written and synced; their directory is not renamed",
    "trainer.renamed": "a directory is published; the worker was not told",
    "trainer.restoring": "the weights of a snapshot are read; the model is not replaced",
}

_armed: str | None = None
_nth = 1
# One step of it is atomic, whatever the number of threads.
_passes = count(1)


def arm(at: str) -> None:
    """What this process does from now on, as TINK_CRASH_AT says it; "" is nothing. Raises StartupError."""
    global _armed, _nth, _passes
    _armed, _nth = parse(at) if at else (None, 1)
    _passes = count(1)


def parse(at: str) -> tuple[str, int]:
    """`name[:n]` -> the name, and which passing it is. Raises StartupError for what is no such thing."""
    name, _, number = at.partition(":")
    if name not in POINTS:
        raise StartupError(f"TINK_CRASH_AT: there is no crash point {name!r}" + suggestion(name, POINTS))
    if number and not (number.isdecimal() and int(number)):
        raise StartupError(f"TINK_CRASH_AT: {number!r} is not a count (1, 2, ...)")
    return name, int(number or 1)


def point(name: str) -> None:
    """The process is at this point; if it was told to, this is its end."""
    if name == _armed and next(_passes) == _nth:
        os.write(2, f"crash point {name}, pid {os.getpid()}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)
