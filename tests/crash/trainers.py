"""Whose affair the training server is: the worker's, or torchrun's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from tests.live import LiveServer
from tests.processes import kill_trainers, server_of
from tink.crash import POINTS
from tools.megatron_trainer import MegatronTrainer


class Trainer(Protocol):
    """`settings` are for its worker."""

    log: Path
    settings: dict[str, str]

    def start(self, crash_at: str = "") -> None:
        """After `kill`. `crash_at`: TINK_CRASH_AT."""

    def rank(self, number: int) -> int | None:
        """One of its processes, if it runs; the server alone if that is all of it."""

    def kill(self) -> None:
        """kill -9, of what would start it again as well."""

    def stop(self) -> None: ...


class Embedded:
    """Its worker starts it, tells the first one where to crash, and ends it."""

    def __init__(self, server: LiveServer) -> None:
        self._server, self.settings = server, dict[str, str]()
        self.log = server.home / "logs" / "trainer.log"

    def start(self, crash_at: str = "") -> None:
        if crash_at:
            self._server.environment["TINK_CRASH_AT"] = crash_at

    def rank(self, number: int) -> int | None:
        return server_of(self._server.home)

    def kill(self) -> None:
        kill_trainers(self._server.home)

    def stop(self) -> None:
        pass


def external(server: LiveServer) -> Trainer:
    """Two processes below torchrun."""
    server.home.mkdir(parents=True, exist_ok=True)
    return MegatronTrainer(server.home, server.home.with_name(f"{server.home.name}.trainer.log"))


ENGINES: dict[str, Callable[[LiveServer], Trainer]] = {"hf": Embedded, "megatron": external}


def points(engine: str) -> list[str]:
    """The crash points that can be reached. Nobody forks here, and a worker that starts no trainer never
    has just started one."""
    never = {"worker.adopted"} | ({"worker.spawned"} if engine != "hf" else set())
    return [point for point in POINTS if point not in never]
