"""The vLLM servers of a bench: real ones, on the CPU, with the built-in model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.vllm.fixtures import find_python
from tests.vllm.server import VllmReplica
from tink.pretrained import BUILT_IN
from tink.trainer import tiny


@contextmanager
def vllm_servers(folder: Path, count: int, *arguments: str) -> Iterator[list[str]]:
    """So many, ready: their URLs. The model and the logs are put into `folder`. Each has a core to itself,
    as it has a GPU elsewhere, if that leaves one for the rest."""
    model = tiny.ensure(folder)
    python = find_python()
    arguments = ("--served-model-name", BUILT_IN, *arguments)
    servers = [
        VllmReplica(python, model, folder / f"vllm-{number}.log", arguments) for number in range(count)
    ]
    cores = os.sched_getaffinity(0)
    own = sorted(cores)[:count] if count < len(cores) else []
    try:
        for number, server in enumerate(servers):
            os.sched_setaffinity(0, own[number : number + 1] or cores)  # which it inherits
            server.start(wait=False)
        os.sched_setaffinity(0, cores - {*own})
        for server in servers:
            server.wait()
        yield [server.url for server in servers]
    finally:
        os.sched_setaffinity(0, cores)
        for server in servers:
            server.close()
