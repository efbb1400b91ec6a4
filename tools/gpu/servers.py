"""The three processes: vLLM, training server and worker. Each is started, waited for and ended here; it
writes a log of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

from tools import vllm_pool
from tools.gpu.shapes import Shape
from tools.ports import free_port

# vLLM's first start on a machine compiles.
START_SECONDS = 400.0
STOP_SECONDS = 30.0


class Server:
    """A program that answers HTTP on a port, which stays the same over restarts."""

    def __init__(self, words: list[str], port: int, path: str, log: Path, **environment: str) -> None:
        """`path` answers 200 once it is ready."""
        self._words, self._path, self._log = words, path, log
        self._environment = environment
        self.url = f"http://127.0.0.1:{port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Does not wait until it is ready."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TINK_", "USE_", "VLLM_"))}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._words,
                env=inherited | self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> float:
        """Until it is ready: seconds since the call. SystemExit if it has ended or takes too long."""
        began = time.monotonic()
        while not self._is_ready():
            assert self._process is not None
            ended = self._process.poll() is not None or self._broken()
            if ended or time.monotonic() - began > START_SECONDS:
                end = self._log.read_text(errors="replace")[-3000:]
                raise SystemExit(f"measure: {self._words[:4]} is not ready:\n{end}")
            time.sleep(0.05)
        return time.monotonic() - began

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}{self._path}", trust_env=False, timeout=5).is_success
        except httpx.TransportError:
            return False

    def _broken(self) -> bool:
        """Whether it says that it will never be ready."""
        try:
            return b"broken" in httpx.get(f"{self.url}/v1/health", trust_env=False, timeout=5).content
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """kill -9, of all its processes."""
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        """In good order, if it does that in time."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        self.kill()

    def _signal(self, number: int) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            self._process.wait()


def vllm(shape: Shape, model: Path, out: Path, program: str, on_gpu: bool) -> Server:
    port = free_port()
    words = [sys.executable, "-m", "tink.cli.main", "vllm", str(model), "--name", shape.name]
    words += ["--port", str(port), "--vllm", program, "--options"]
    environment = {"VLLM_GPU_MEMORY_UTIL": str(shape.share), "VLLM_MAX_LORA_RANK": "32"}
    if on_gpu:
        words += ["--max-model-len", "4096", "--max-num-seqs", "256", "--disable-uvicorn-access-log"]
        # FlashInfer's is compiled at the start, for over a minute, and not used where seeds are given.
        environment["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    else:
        # Without the latter a seeded prompt that is cut in two would kill the engine (docs/vllm.md).
        words += [*vllm_pool.OPTIONS.split(), "--no-enable-chunked-prefill"]
        environment |= vllm_pool.ENVIRONMENT
    return Server(words, port, "/health", out / "vllm.log", **environment)


def trainer(shape: Shape, model: Path, out: Path) -> Server:
    port = free_port()
    words = [sys.executable, "-m", "tink.trainer", "--engine", "megatron", "--port", str(port)]
    words += ["--model", str(model), "--model-name", shape.name, "--dtype", shape.dtype]
    words += ["--home", str(out / "home")]
    return Server(words, port, "/v1/info", out / "trainer.log")


def worker(shape: Shape, trainer: Server, sampler: Server, out: Path) -> Server:
    port = free_port()
    words = [
        sys.executable,
        "-m",
        "tink.cli.main",
        "serve",
        "--home",
        str(out / "home"),
        "--port",
        str(port),
    ]
    return Server(
        words,
        port,
        "/healthz",
        out / "worker.log",
        USE_MEGATRON="true",
        MEGATRON_SERVER_URL=trainer.url,
        USE_VLLM="true",
        VLLM_BASE_URL=sampler.url,
        VLLM_MAX_LORA_RANK="32",
    )
