"""Two vLLM servers on this machine's CPU, for the demo: `tink vllm` with as little memory as it takes."""

from __future__ import annotations

import contextlib
import os
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
# The first start on a machine compiles, and two share its cores.
START_SECONDS = 600.0

ENVIRONMENT = {
    # One engine process instead of two, and no compilation: 1 GB each, and up in half a minute.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    # In GiB, and then cut by --num-gpu-blocks-override; without it vLLM takes a share of all memory.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
OPTIONS = (
    "--dtype float32 --max-model-len 512 --max-num-seqs 128 --block-size 32 --num-gpu-blocks-override 1024 "
    "--enforce-eager --distributed-executor-backend uni --max-cpu-loras 8 --disable-uvicorn-access-log"
)


class Server:
    """One of them, on a port that stays the same over restarts."""

    def __init__(self, vllm: Path, model: Path, name: str, log: Path) -> None:
        self._vllm, self._model, self._name, self.log = vllm, model, name, log
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Does not wait until it is up."""
        command = [sys.executable, "-m", "tink.cli.main", "vllm", str(self._model), "--name", self._name]
        command += ["--port", str(self._port), "--vllm", str(self._vllm), "--options", *OPTIONS.split()]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TINK_")}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment | ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def is_up(self) -> bool:
        """SystemExit if it has ended."""
        if self._process is None or self._process.poll() is not None:
            raise SystemExit(f"demo: vLLM did not start:\n{self.log.read_text(errors='replace')[-4000:]}")
        try:
            return httpx.get(f"{self.url}/health", trust_env=False, timeout=5).is_success
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """kill -9, of all its processes."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@contextmanager
def running(home: Path, model: Path, name: str, count: int = 2) -> Iterator[list[Server]]:
    """Servers of the model that are up. They are killed in the end."""
    print("installing vLLM for the CPU, unless it is there", flush=True)
    made = subprocess.run([ROOT / "tools" / "vllm-venv"], stdout=subprocess.PIPE, text=True, check=True)
    vllm = Path(made.stdout.strip()).with_name("vllm")
    servers = [Server(vllm, model, name, home / f"vllm-{number}.log") for number in range(count)]
    try:
        print(f"starting {count} vLLM servers, which takes a minute", flush=True)
        for server in servers:
            server.start()
        deadline = time.monotonic() + START_SECONDS
        while not all(server.is_up() for server in servers):
            if time.monotonic() > deadline:
                raise SystemExit(f"demo: vLLM is not up after {START_SECONDS:.0f} s, see {servers[0].log}")
            time.sleep(0.5)
        yield servers
    finally:
        for server in servers:
            server.kill()
