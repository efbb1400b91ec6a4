"""Structured logs: one line an event, `key=value`, on standard error. What is logged are ids, kinds,
sizes and times; never a body, a prompt or a key."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import TextIO

import structlog


def write_line(line: str, stream: TextIO | None = None) -> None:
    """One line to standard error (or `stream`), whatever becomes of it: where the disk of a log is full, or
    the reader of a pipe is gone, that must not stop the one who tells of it. Nothing is kept in a buffer
    either: what cannot be written at its end changes the exit status of a Python process."""
    stream = stream or sys.stderr
    try:
        handle = stream.fileno()
    except (OSError, ValueError):  # not a file: a test has put something in its place
        print(line, file=stream)
        return
    with contextlib.suppress(OSError):
        os.write(handle, f"{line}\n".encode(errors="backslashreplace"))


class _Lines:
    """What structlog writes to."""

    def __init__(self, *_names: str) -> None: ...

    def msg(self, message: str) -> None:
        write_line(message)

    debug = info = warning = error = critical = exception = fatal = log = msg


def configure_logs(level: str) -> None:
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(
                key_order=["timestamp", "level", "event"], bool_as_flag=False, drop_missing=True
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=_Lines,
    )
