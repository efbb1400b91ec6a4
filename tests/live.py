"""A real `tink serve` for tests, with its real embedded trainer or a `tink trainer` of its own: started,
killed, started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import httpx

from tests.processes import kill_trainers
from tools.ports import free_port

START_SECONDS = 120.0


class LiveServer:
    """`tink serve` in a process of its own, on a home of its own. `url` stays the same over restarts.
    `program` is the module that serves; `limit` is called in the new process before it begins."""

    def __init__(
        self,
        home: Path,
        *,
        program: str = "tink.cli.main",
        limit: Callable[[], None] | None = None,
        **environment: str,
    ) -> None:
        self.home = home
        self.program, self.limit = program, limit
        self.environment = environment
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.log = home.with_name(f"{home.name}.log")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def command(self) -> list[str]:
        command = [sys.executable, "-m", self.program, "serve"]
        return [*command, "--home", str(self.home), "--port", str(self.port)]

    def start(self, *, wait: bool = True) -> None:
        with self._open_log() as log:
            self.process = subprocess.Popen(
                self.command,
                env={**os.environ, **self.environment},
                stdout=log,
                stderr=log,
                preexec_fn=self.limit,
            )
        if wait:
            self.wait_until_ready()

    def _open_log(self) -> IO[bytes]:
        return self.log.open("ab")

    def wait_until_listening(self) -> None:
        """Until it answers; its trainer may still be starting."""

        def listens() -> bool:
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"tink serve exited with {self.process.returncode}:\n{self.output()}")
            try:
                record = json.loads((self.home / "worker.json").read_text())
                self.port = int(record["url"].rpartition(":")[2])
                return record["pid"] == self.process.pid and httpx.get(f"{self.url}/healthz").is_success
            except (OSError, ValueError, httpx.TransportError):
                return False

        self._wait(listens, "did not come up")

    def wait_until_ready(self) -> None:
        """Until its trainer answers too: the capabilities are the trainer's."""
        self.wait_until_listening()
        httpx.get(
            f"{self.url}/api/v1/get_server_capabilities",
            headers={"X-API-Key": "tml-local"},
            timeout=START_SECONDS,
        ).raise_for_status()

    def wait_for_output(self, *words: str) -> None:
        self._wait(lambda: all(word in self.output() for word in words), f"did not print {words}")

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        """Another process gives no event to wait for, so this looks, and again."""
        deadline = time.monotonic() + START_SECONDS
        while not done():
            if time.monotonic() > deadline:
                raise AssertionError(f"tink serve {what}:\n{self.output()}")
            time.sleep(0.02)

    def kill(self) -> None:
        """kill -9 of the worker alone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Until `resume` it does nothing; its trainer goes on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def terminate(self) -> int:
        """SIGTERM; returns the exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(timeout=60)

    def wait_for_exit(self, seconds: float = 60.0) -> int:
        """Until it ends by itself; returns the exit status."""
        assert self.process is not None
        return self.process.wait(timeout=seconds)

    def trainer_pid(self) -> int:
        return int(json.loads((self.home / "trainer.json").read_text())["pid"])

    def kill_trainer(self) -> None:
        os.kill(self.trainer_pid(), signal.SIGKILL)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def close(self) -> None:
        """Ends both processes, whatever state they are in."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=40)
            except subprocess.TimeoutExpired:
                self.kill()
        kill_trainers(self.home)


class LiveTrainer:
    """`tink trainer` in a process of its own, on a port that stays the same over restarts. Who starts it
    need not wait for it."""

    def __init__(self, home: Path, *arguments: str | Path, **environment: str) -> None:
        self.home, self.arguments, self.environment = home, arguments, environment
        self.log = home.with_name(f"{home.name}.log")
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "tink.cli.main", "trainer", "--port", str(self.port)]
        command += ["--home", str(self.home), *map(str, self.arguments)]
        with self.log.open("ab") as log:
            environment = {**os.environ, **self.environment}
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._is_ready():
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"tink trainer did not come up:\n{self.log.read_text()}")
            time.sleep(0.05)

    def _is_ready(self) -> bool:
        try:
            return bool(httpx.get(f"{self.url}/v1/health").json()["state"] == "ready")
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
