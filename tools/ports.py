"""Ports for servers that are killed and started again."""

from __future__ import annotations

import contextlib
import random
import socket


def free_port() -> int:
    """Below those that systems give to whoever asks for any: between two lives nobody else gets it."""
    while True:
        port = random.randrange(10_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
