"""A training server of two processes on this machine's CPU, for the demo and the kill loop: megatron-core
with half of each layer in either. `torchrun` watches them, and starts both again when one dies."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tools.ports import free_port

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2
# It imports torch in three processes and reads a tiny model.
START_SECONDS = 120.0
STOP_SECONDS = 30.0
# How often torchrun looks after its processes: its default is a tenth of that.
LOOKS_PER_SECOND = 10
# It gives up after so many. A kill loop kills often.
RESTARTS = 10_000


class MegatronTrainer:
    """torchrun and its processes (ranks), on a port that stays the same over restarts. `home` is the
    worker's: they share its artifact folder. `model` None is the built-in one."""

    def __init__(self, home: Path, log: Path, model: Path | None = None, name: str | None = None) -> None:
        self.log = log
        # It is in the command line of all processes, by which they are found.
        self._ready = home / "trainer.json"
        port, token = free_port(), secrets.token_hex()
        self.url = f"http://127.0.0.1:{port}"
        # For the worker.
        self.settings = {
            "USE_MEGATRON": "true",
            "MEGATRON_SERVER_URL": self.url,
            "TINK_TRAINER_TOKEN": token,
        }
        self._options = ["--home", str(home), "--port", str(port), "--ready-file", str(self._ready)]
        # Should whoever started it be killed, it will not stay for long.
        self._options += ["--orphan-seconds", "60"]
        if model is not None:
            self._options += ["--model", str(model)]
        if name is not None:
            self._options += ["--model-name", name]
        # torchrun makes directories there, else under /tmp, and leaves them.
        self._logs = home / "logs" / "torchrun"
        self._torchrun: subprocess.Popen[bytes] | None = None

    def start(self, crash_at: str = "") -> None:
        """Does not wait until it is up. `crash_at`: TINK_CRASH_AT."""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={RANKS}", f"--max-restarts={RESTARTS}"]
        command += [f"--monitor-interval={1 / LOOKS_PER_SECOND}", f"--log-dir={self._logs}"]
        command += ["-m", "tink.trainer", "--engine", "megatron", *self._options]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TINK_")}
        environment |= {"TINK_TRAINER_TOKEN": self.settings["TINK_TRAINER_TOKEN"], "OMP_NUM_THREADS": "1"}
        if crash_at:
            environment["TINK_CRASH_AT"] = crash_at
        with self.log.open("ab") as log:
            self._torchrun = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def is_up(self) -> bool:
        """SystemExit if it has ended."""
        if self._torchrun is None or self._torchrun.poll() is not None:
            raise SystemExit(
                f"the training server did not start:\n{self.log.read_text(errors='replace')[-4000:]}"
            )
        try:
            health = httpx.get(f"{self.url}/v1/health", trust_env=False, timeout=5)
            return health.is_success and health.json()["state"] == "ready"
        except httpx.TransportError:
            return False

    def rank(self, number: int) -> int | None:
        """The process id of one of them, if it runs."""
        for pid in self._processes():
            with contextlib.suppress(OSError):  # it has just ended
                if f"RANK={number}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    return pid
        return None

    def kill_rank(self, number: int) -> int | None:
        """kill -9. Returns its process id; None if it does not run just then."""
        pid = self.rank(number)
        if pid is not None:
            _kill(pid)
        return pid

    def kill(self) -> None:
        """kill -9, of torchrun and all ranks: what it starts meanwhile, too."""
        while pids := self._processes():
            for pid in pids:
                _kill(pid)
            if self._torchrun is not None:
                self._torchrun.wait()

    def stop(self) -> None:
        """SIGTERM, and what does not heed it is killed."""
        if self._torchrun is not None:
            self._torchrun.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._torchrun.wait(STOP_SECONDS)
        self.kill()

    def _processes(self) -> list[int]:
        """torchrun and its ranks."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has just ended
                if os.fsencode(self._ready) in entry.read_bytes().split(b"\0"):
                    found.append(int(entry.parent.name))
        return found


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, signal.SIGKILL)


@contextmanager
def running(home: Path, model: Path, name: str) -> Iterator[MegatronTrainer]:
    """A server that is up. It is stopped in the end."""
    log = home / "trainer.log"
    log.unlink(missing_ok=True)
    trainer = MegatronTrainer(home, log, model, name)
    try:
        print(f"starting the training server: torchrun and {RANKS} processes, its log is {log}", flush=True)
        trainer.start()
        deadline = time.monotonic() + START_SECONDS
        while not trainer.is_up():
            if time.monotonic() > deadline:
                raise SystemExit(f"the training server is not up after {START_SECONDS:.0f} s, see {log}")
            time.sleep(0.1)
        yield trainer
    finally:
        trainer.stop()
