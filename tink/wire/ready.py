"""The ready file, by which a training server says where it listens to who started it."""

from __future__ import annotations

import msgspec


class Ready(msgspec.Struct, frozen=True):
    """Written once the port is bound, before the model is loaded."""

    pid: int
    port: int
    incarnation: str
