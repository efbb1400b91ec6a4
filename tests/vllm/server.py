"""A real `vllm serve` on the CPU, for tests: a tiny model, as little memory as it takes (about 1 GB)."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from tools.ports import free_port

# The first start on a machine compiles, and two share its cores.
START_SECONDS = 300.0
CONTEXT = 256
# What one said (tests/vllm/record.py).
RECORDING = Path(__file__).with_name("recording.json")

ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    # /pause and the like.
    "VLLM_SERVER_DEV_MODE": "1",
    # One engine process instead of two.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Else the first request with logprobs compiles C++ for 20 s.
    "TORCHDYNAMO_DISABLE": "1",
    # In GiB, and then cut by --num-gpu-blocks-override; without it vLLM takes most of the memory.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
ARGUMENTS = [
    *("--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", str(CONTEXT), "--max-num-seqs", "64"),
    *("--block-size", "32", "--num-gpu-blocks-override", "512", "--enforce-eager"),
    *("--distributed-executor-backend", "uni", "--disable-uvicorn-access-log"),
    *("--enable-lora", "--max-loras", "4", "--max-lora-rank", "64", "--max-cpu-loras", "8"),
    *("--shutdown-timeout", "20"),
    # On the CPU a request with a seed whose prompt is cut in two kills the engine (docs/vllm.md).
    "--no-enable-chunked-prefill",
]


class VllmReplica:
    """One server, on a port that stays the same over restarts. `python` is that of the virtual environment
    with vLLM; later `arguments` win, and so do variables of `environment` ("" takes one away)."""

    def __init__(
        self, python: Path, model: Path, log: Path, arguments: Sequence[str] = (), **environment: str
    ) -> None:
        self.python, self.model, self.log = python, model, log
        self.arguments, self.environment = arguments, environment
        self.process: subprocess.Popen[bytes] | None = None
        self.port = free_port()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, *, wait: bool = True) -> None:
        command = [self.python.with_name("vllm"), "serve", self.model, "--served-model-name", "base"]
        command += ["--port", str(self.port), *ARGUMENTS, *self.arguments]
        # What the tests themselves need would mislead it.
        environment = {
            name: value
            for name, value in os.environ.items()
            if name != "PYTHONPATH" and not name.startswith("TINK_")
        }
        environment |= ENVIRONMENT | self.environment
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env={name: value for name, value in environment.items() if value},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until it is well."""
        deadline = time.monotonic() + START_SECONDS
        while not self.is_well():
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(
                    f"vLLM did not come up:\n{self.log.read_text(errors='replace')[-4000:]}"
                )
            time.sleep(0.1)

    def is_well(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", trust_env=False, timeout=5).is_success
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """kill -9, of all its processes."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def terminate(self) -> None:
        """SIGTERM: it serves what it has, and ends. Does not wait for that."""
        assert self.process is not None
        self.process.terminate()

    def pause(self) -> None:
        """Aborts what runs; what comes waits."""
        httpx.post(f"{self.url}/pause", trust_env=False, timeout=30).raise_for_status()

    def resume(self) -> None:
        httpx.post(f"{self.url}/resume", trust_env=False, timeout=30).raise_for_status()

    def hang(self) -> None:
        """SIGSTOP, of all its processes: it accepts connections, and answers nothing."""
        self._signal(signal.SIGSTOP)

    def recover(self) -> None:
        """From a hang."""
        self._signal(signal.SIGCONT)

    def adapters(self) -> list[str]:
        """By the names that requests use."""
        models = httpx.get(f"{self.url}/v1/models", trust_env=False, timeout=30).json()["data"]
        return [model["id"] for model in models if model["parent"] is not None]

    def metric(self, name: str) -> float:
        """The sum of a series, such as `num_requests_running`."""
        text = httpx.get(f"{self.url}/metrics", trust_env=False, timeout=30).text
        return sum(float(value) for value in re.findall(rf"^vllm:{name}{{.*}} (\S+)$", text, re.MULTILINE))

    def close(self) -> None:
        self.kill()

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)
