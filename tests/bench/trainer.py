"""Training on the embedded engine, against a plain loop of transformers and peft on the same model and the
same number of tokens: tokens a second by one adapter, and by eight that train at once, and the memory of
the process.

A real `tink serve`, asked by the SDK; a step is one forward_backward and one optim_step, two steps ahead.
The plain loop does not compute a loss for each token, takes no snapshots and keeps nothing. The model is
random, of a few million parameters: on so little, what is done around the arithmetic counts more than on a
GPU."""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import tinker
from tinker import types

from tests.bench.figures import Figure
from tests.live import LiveServer
from tools.gpu.shapes import SHAPES, make

SUMMARY = "the embedded engine's tokens a second, against a plain loop"
SHAPE = SHAPES["tiny"]
ADAPTERS = 8


class Loop(msgspec.Struct):
    """What plain.py says."""

    tokens_per_second: float
    resident_mb: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=30, help="of one adapter in a round (30)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each; the median counts (3)")


def run(arguments: argparse.Namespace) -> Iterator[Figure]:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TINKER_TELEMETRY": "0"}
    with tempfile.TemporaryDirectory(prefix="tink-bench-") as name:
        directory = make(SHAPE, Path(name))
        server = LiveServer(
            Path(name) / "home", USE_HF="true", TINK_HF_MODEL=str(directory), MAX_WORKERS="8"
        )
        server.start()
        try:
            clients = _clients(server, ADAPTERS)
            one, eight, plain = [], [], []
            for number in range(arguments.rounds + 1):
                loop = _plain(Path(name))
                alone = _together(clients[:1], arguments.steps)
                together = _together(clients, max(1, arguments.steps // ADAPTERS))
                if number:  # the first warms up
                    plain.append(loop)
                    one.append(alone)
                    eight.append(together)
            base = median(loop.tokens_per_second for loop in plain)
            yield Figure("trainer_1_adapter", median(one), "tokens/s", base)
            yield Figure(f"trainer_{ADAPTERS}_adapters", median(eight), "tokens/s", base)
            memory = _resident_mb(server.trainer_pid())
            yield Figure("trainer_memory", memory, "MB", median(loop.resident_mb for loop in plain))
        finally:
            server.close()


def _plain(folder: Path) -> Loop:
    command = [sys.executable, "-m", "tools.gpu.plain", "peft", SHAPE.name, str(folder)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
    return msgspec.json.decode(said.splitlines()[-1], type=Loop)


def _clients(server: LiveServer, count: int) -> list[Any]:
    service = tinker.ServiceClient(base_url=server.url, api_key="tml-local")
    (base,) = service.get_server_capabilities().supported_models
    futures = [
        service.create_lora_training_client(base.model_name, rank=SHAPE.rank, seed=seed)
        for seed in range(count)
    ]
    return [future.result() for future in futures]


def _together(clients: list[Any], steps: int) -> float:
    """Tokens a second, of all of them."""
    with ThreadPoolExecutor(len(clients)) as pool:
        began = time.monotonic()
        list(pool.map(lambda client: _train(client, steps), clients))
    return len(clients) * steps * SHAPE.tokens / (time.monotonic() - began)


def _train(client: Any, steps: int) -> None:
    data, adam = _batch(), types.AdamParams(learning_rate=1e-4)
    sent: list[Any] = []
    for _ in range(steps):
        sent += [client.forward_backward(data, "cross_entropy"), client.optim_step(adam)]
        while len(sent) > 4:
            sent.pop(0).result()
    for future in sent:
        future.result()


def _batch() -> list[types.Datum]:
    rng, found = random.Random(1), []
    for _ in range(SHAPE.rows):
        tokens = [rng.randrange(1, SHAPE.vocab) for _ in range(SHAPE.length + 1)]
        inputs: Any = {"target_tokens": tokens[1:], "weights": [1.0] * SHAPE.length}
        found.append(
            types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)
        )
    return found


def _resident_mb(pid: int) -> float:
    """The most that it ever had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (found,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(found) / 1000
