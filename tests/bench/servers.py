"""The vLLM servers of a bench: real ones, on the CPU, with the built-in model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.vllm.fixtures import find_python
from tests.vllm.server import VllmReplica
from tink.trainer import tiny


@contextmanager
def vllm_servers(folder: Path, count: int, *arguments: str) -> Iterator[list[str]]:
    """So many, ready: their URLs. The model and the logs are put into `folder`."""
    model = tiny.ensure(folder)
    python = find_python()
    arguments = ("--served-model-name", tiny.NAME, *arguments)
    servers = [
        VllmReplica(python, model, folder / f"vllm-{number}.log", arguments) for number in range(count)
    ]
    try:
        for server in servers:
            server.start(wait=False)
        for server in servers:
            server.wait()
        yield [server.url for server in servers]
    finally:
        for server in servers:
            server.close()
