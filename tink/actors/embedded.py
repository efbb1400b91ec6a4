"""The embedded training server: a process that outlives the worker, and the parent that forks it.

A worker that is killed leaves its trainer, with everything it holds, to the next worker of the same
home, which adopts it; without one the trainer ends by itself after a while. A trainer that is killed is
followed by the next one of its parent (tink/trainer/preload.py); if that is gone too, the worker starts
both anew. One that is silent for SILENT_LOOKS, or that the link finds unfit, is killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import signal
import subprocess
import sys
from pathlib import Path

import structlog
import trio

import tink
from tink import crash
from tink.backends.endpoint import Endpoint
from tink.backends.trainer import TrainerClient, TrainerGone, TrainerRefused
from tink.errors import StartupError
from tink.home import Home
from tink.limits import HEALTH_SECONDS, PROCESS_LOOK_SECONDS, SILENT_LOOKS, START_SECONDS, STOP_SECONDS
from tink.settings import Settings
from tink.wire import tink_train
from tink.wire.ready import Ready
from tink.world import World

# What torchrun tells the processes that it starts: the trainer is none of them, and alone.
TORCHRUN = frozenset(("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
# Of the worker's environment, what its trainer must not inherit.
WITHHELD = TORCHRUN | {"TINK_API_KEYS", "TINK_CRASH_AT", "TINK_DATABASE_URL"}
PROC = Path("/proc")
# States of a process, as the kernel says them: dead and not yet reaped; stopped, by a signal or a debugger.
DEAD, STOPPED = frozenset("ZX"), frozenset("Tt")

log = structlog.get_logger()


class EmbeddedTrainer:
    """`find` is for TrainerLink; `stop` ends the child, when the worker stops in good order."""

    def __init__(self, settings: Settings, home: Home, world: World) -> None:
        self._home, self._world = home, world
        self._token = hmac.new(home.load_secret(), b"trainer", hashlib.sha256).hexdigest()
        self._command = command(settings, home)
        # For the first trainer alone: else none could live.
        self._crash_at = settings.crash_at if settings.crash_at.startswith("trainer.") else ""
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def _signature(self) -> str:
        """What a trainer must have been started with to be adopted: these options, by this Tink."""
        return "\n".join([*self._command, tink.__version__])

    async def find(self, unfit: str | None = None) -> Endpoint:
        """A running server of this configuration: the present one, else a new one. Waits for one that is
        silent, but not for ever. The present one is killed if its incarnation is `unfit`."""
        record = self._home.trainer_record()
        if record is not None and self._of_this_configuration():
            if record.incarnation != unfit and await self._serves(record):
                return self._endpoint(record)
            if self._runs(record.pid):
                # It holds nothing that is needed, and whether it would listen is not known.
                log.info("killing trainer", pid=record.pid)
                _signal(record.pid, signal.SIGKILL)
                await self._wait_for_death([record.pid])
        return await self._start()

    async def stop(self) -> None:
        """Ends the server, even one that has not said yet that it runs: SIGTERM, and SIGKILL for what does
        not listen. The journal has all it knew."""
        pids = self._trainers()
        for pid in pids:
            log.info("stopping trainer", pid=pid)
            # A stopped process hears no SIGTERM.
            _signal(pid, signal.SIGKILL if _state(pid) in STOPPED else signal.SIGTERM)
        with trio.move_on_after(STOP_SECONDS):
            await self._wait_for_death(pids)
        while pids := self._trainers():  # again: its parent may have been quicker
            for pid in pids:
                _signal(pid, signal.SIGKILL)
            await self._wait_for_death(pids)
        with contextlib.suppress(OSError):  # what is left of it names a process that is no more
            self._home.trainer.unlink(missing_ok=True)

    # -- the present one ----------------------------------------------------------------------------

    def _endpoint(self, record: Ready) -> Endpoint:
        return Endpoint(f"http://127.0.0.1:{record.port}", self._token)

    async def _serves(self, record: Ready) -> bool:
        """Whether it answers, within SILENT_LOOKS. False at once when it is dead, or not ours."""
        began = self._world.monotonic()
        for _ in range(SILENT_LOOKS):
            next_look = trio.current_time() + HEALTH_SECONDS
            health = await self._health(record)
            if health is not None:
                return health.state != "broken"
            if not self._runs(record.pid):
                return False
            with trio.move_on_at(next_look):
                await self._wait_for_death([record.pid])
                return False
        silent = round(self._world.monotonic() - began)
        log.error("trainer is stuck", pid=record.pid, silent_seconds=silent)
        return False

    async def _health(self, record: Ready) -> tink_train.Health | None:
        endpoint = self._endpoint(record)
        try:
            async with TrainerClient.connect(
                endpoint.url, self._world, slots=1, token=endpoint.token
            ) as client:
                health = await client.health()
        except (TrainerGone, TrainerRefused):
            return None  # TrainerRefused: another one's server, on the port that ours had
        return health if health.incarnation == record.incarnation else None

    def _alive(self, pid: int) -> bool:
        if self._child is not None and self._child.pid == pid:
            return self._child.poll() is None
        state = _state(pid)
        return state is not None and state not in DEAD

    def _of_this_configuration(self) -> bool:
        """Whether the trainer that a former worker left was started as this one would start it."""
        with contextlib.suppress(OSError):
            return self._home.trainer_command.read_text() == self._signature
        return False

    def _trainers(self) -> list[int]:
        """All processes of this home's server: itself, and the parent that it was forked from."""
        pids = {int(name) for name in os.listdir("/proc") if name.isdecimal()} if PROC.is_dir() else set()
        pids |= {one.pid for one in (self._home.trainer_record(), self._child) if one is not None}
        return [pid for pid in pids if self._runs(pid)]

    def _runs(self, pid: int) -> bool:
        return self._alive(pid) and self._is_trainer(pid)

    async def _wait_for_death(self, pids: list[int]) -> None:
        """By looking: an adopted process is nobody's child here."""
        while any(self._alive(pid) for pid in pids):  # noqa: ASYNC110
            await trio.sleep(PROCESS_LOOK_SECONDS)

    def _is_trainer(self, pid: int) -> bool:
        """A pid from a file may belong to anyone after a reboot, to the trainer of another home too."""
        if self._child is not None and self._child.pid == pid:
            return True
        with contextlib.suppress(OSError):
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            return os.fsencode(self._home.trainer) in arguments
        return False

    # -- a new one ----------------------------------------------------------------------------------

    async def _start(self) -> Endpoint:
        left = self._trainers() if self._of_this_configuration() else []
        if left:
            # The server was killed and its parent forks the next one; or their worker was killed while they
            # were starting.
            log.info("a trainer is about to serve", pids=left)
            endpoint = await self._said(left)
            if endpoint is not None:
                return endpoint
        await self.stop()
        self._home.check_writable()  # where it could not say that it serves
        with self._home.writing():
            self._home.trainer_command.write_text(self._signature)
            self._child = await self._world.run_sync(self._spawn)
        crash.point("worker.spawned")
        log.info("starting trainer", pid=self._child.pid, log=str(self._home.trainer_log))
        endpoint = await self._said([self._child.pid])
        if endpoint is not None:
            return endpoint
        status = self._child.poll()
        if status is None:
            await self.stop()
        if status is not None and status < 0:
            raise TrainerGone(f"the trainer was killed by signal {-status} while it started")
        raise StartupError(
            f"the trainer did not start ({'no answer' if status is None else f'exit status {status}'}); "
            f"the end of {self._home.trainer_log}:\n{self._last_lines()}"
        )

    async def _said(self, pids: list[int]) -> Endpoint | None:
        """Where one of these, or a child of theirs, says that it serves. None if they have all ended, one
        is stopped, or nothing was said for START_SECONDS."""
        # Counted, and not timed: a worker that was stopped meanwhile gives them their time all the same.
        for _ in range(int(START_SECONDS / PROCESS_LOOK_SECONDS)):
            record = self._home.trainer_record()
            if record is not None and self._runs(record.pid):
                return self._endpoint(record)
            if not any(self._alive(pid) for pid in pids) or any(_state(pid) in STOPPED for pid in pids):
                break
            await trio.sleep(PROCESS_LOOK_SECONDS)
        return None

    def _spawn(self) -> subprocess.Popen[bytes]:
        with self._home.trainer_log.open("ab") as output:
            return subprocess.Popen(  # noqa: S603  the command is ours
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment(),
                # A session of its own: Ctrl-C and the death of the worker are not its own.
                start_new_session=True,
            )

    def _environment(self) -> dict[str, str]:
        """The clients' keys are none of the trainer's business, nor who started the worker."""
        inherited = {name: value for name, value in os.environ.items() if name not in WITHHELD}
        crash_at, self._crash_at = self._crash_at, ""
        more = {"TINK_CRASH_AT": crash_at} if crash_at else {}
        return {**inherited, "TINK_TRAINER_TOKEN": self._token, **more}

    def _last_lines(self, count: int = 5) -> str:
        lines = self._home.trainer_log.read_text(errors="replace").splitlines()[-count:]
        return "\n".join(f"  {line[:300]}" for line in lines)


def _state(pid: int) -> str | None:
    """One letter; None if there is no such process."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return None


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended by itself just now
        os.kill(pid, number)


def command(settings: Settings, home: Home) -> list[str]:
    command = [sys.executable, "-m", "tink.trainer", "--preload", "--home", str(home.root)]
    command += ["--artifacts", str(settings.artifact_root), "--ready-file", str(home.trainer)]
    command += ["--slots", str(settings.max_workers), "--threads", str(settings.trainer_threads)]
    command += ["--orphan-seconds", str(settings.trainer_orphan_seconds)]
    if settings.hf_model:
        command += ["--model", settings.hf_model]
    if settings.hf_model_name:
        command += ["--model-name", settings.hf_model_name]
    return command
