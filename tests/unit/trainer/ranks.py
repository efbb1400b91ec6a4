"""One engine on several processes, as torchrun would start them: `lead` runs a function of the engine on
all of them and hands its result back. Run as a script it is one of those processes."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from tink.logs import configure_logs
from tink.trainer.artifacts import Artifacts


class Group(NamedTuple):
    """The processes, the first rank first, and where the result will be."""

    processes: list[subprocess.Popen[str]]
    result: Path

    def wait(self) -> list[int]:
        """Exit statuses, when all have ended."""
        return [process.wait(120) for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


def start(
    function: Callable[..., Any],
    model: Path,
    folder: Path,
    spoil: Callable[..., None] | None = None,
    patience: float = 300.0,
    *,
    ranks: int = 2,
    stages: int = 1,
) -> Group:
    """So many. The leader calls `function(engine, artifacts)`; the others follow, and the engine of the
    last one is first given to `spoil`. Each waits for the others for so many seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    result = folder / "result.pickle"
    processes = []
    for rank in range(ranks):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            # torchrun says so as well.
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        names = [_name(function), _name(spoil) if spoil else ""]
        processes.append(
            subprocess.Popen(
                [sys.executable, __file__, *names, *map(str, (model, folder, result, patience, stages))],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return Group(processes, result)


def lead(function: Callable[..., Any], model: Path, folder: Path, **shape: int) -> Any:
    group = start(function, model, folder, **shape)
    try:
        errors = [process.communicate(timeout=240)[1] for process in group.processes]
        assert not any(group.wait()), "\n".join(errors)
        return pickle.loads(group.result.read_bytes())
    finally:
        group.kill()


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__}:{function.__qualname__}"


def _find(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), function)
    return found


def main(
    function: str, spoil: str, model: str, folder: str, result: str, patience: str, stages: str
) -> None:
    from tink.trainer.engines import lockstep, megatron
    from tink.trainer.engines.lora_engine import LoraEngine

    configure_logs("info")
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    megatron.COLLECTIVE_SECONDS = float(patience)
    artifacts = Artifacts(Path(folder) / "artifacts", f"rank{rank}")
    base = megatron.load(Path(model), "test/tiny", ranks=ranks, stages=int(stages))
    # Few, so that a request is several micro-batches, and its longest sequences are computed twice.
    engine = LoraEngine(base, artifacts, micro_batch_tokens=32)
    group = lockstep.gather()
    if rank:
        if spoil and rank == ranks - 1:
            _find(spoil)(engine)
        lockstep.follow(engine, group)
    found = _find(function)(lockstep.Leader(engine, group, threading.Lock()), artifacts)
    Path(result).write_bytes(pickle.dumps(found))
    lockstep.leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
