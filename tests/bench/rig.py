"""What most benches of the HTTP side need: a real worker before servers that compute nothing, a model in
it, and clients in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec

from tests.bench.load import Load, Report
from tests.live import LiveServer
from tests.null_servers import MODEL, Ports
from tests.processes import cpu_seconds, serving


class Worker(NamedTuple):
    live: LiveServer

    @property
    def port(self) -> int:
        return self.live.port

    @property
    def cpu(self) -> float:
        """Seconds until now."""
        return cpu_seconds(self._pid)

    @property
    def memory(self) -> int:
        """Resident bytes that are its own."""
        lines = Path(f"/proc/{self._pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024

    @property
    def connections(self) -> int:
        """Open ones, by which it is asked or asks."""
        files = Path(f"/proc/{self._pid}/fd")
        return sum(os.readlink(file).startswith("socket:") for file in files.iterdir())

    @property
    def _pid(self) -> int:
        assert self.live.process is not None
        return self.live.process.pid

    def post(self, path: str, **fields: Any) -> Any:
        answer = httpx.post(f"{self.live.url}/api/v1/{path}", json=fields, timeout=60)
        answer.raise_for_status()
        return answer.json()

    def session(self) -> str:
        return str(self.post("create_session", tags=[], sdk_version="bench")["session_id"])

    def model(self, session: str, number: int = 0) -> str:
        """One that is made, whose next number is 1."""
        ids = {"session_id": session, "model_seq_id": number}
        made = self.post("create_model", **ids, base_model=MODEL, lora_config={"rank": 8})
        self.post("retrieve_future", request_id=made["request_id"], allow_metadata_only=False)
        return f"{session}:train:{number}"


@contextmanager
def worker(folder: Path, *, vllm: bool = False) -> Iterator[Worker]:
    """`tink serve` before a training server that computes nothing, and with `vllm` such a vLLM server."""
    home = folder / "home"
    with serving("tests.null_servers", folder / "null.json", str(home / "artifacts")) as null:
        ports = msgspec.json.decode(null.said, type=Ports)
        settings = {"USE_MEGATRON": "true", "MEGATRON_SERVER_URL": f"http://127.0.0.1:{ports.trainer}"}
        if vllm:
            settings |= {"USE_VLLM": "true", "VLLM_BASE_URL": f"http://127.0.0.1:{ports.vllm}"}
        live = LiveServer(home, **settings)
        live.start()
        try:
            yield Worker(live)
        finally:
            live.close()


@contextmanager
def instant(folder: Path) -> Iterator[int]:
    """The port of a server that answers the SDK at once, and is no worker."""
    with serving("tests.bench.instant", folder / "instant.json") as server:
        yield msgspec.json.decode(server.said, type=int)


@contextmanager
def clients(loads: Sequence[Load]) -> Iterator[list[Report]]:
    """Begins them all; what they report is in the list at the end of the block, which waits for them."""
    processes = []
    for load in loads:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.load"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(load))
        process.stdin.close()
        processes.append(process)
    reports: list[Report] = []
    try:
        yield reports
        for process in processes:
            assert process.stdout is not None
            said = process.stdout.read()
            if process.wait() != 0:
                raise SystemExit("a client of the bench has failed: see above")
            reports.append(msgspec.json.decode(said, type=Report))
    finally:
        for process in processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def asked(loads: Sequence[Load]) -> list[Report]:
    """What they report, once all have ended."""
    with clients(loads) as reports:
        pass
    return reports
