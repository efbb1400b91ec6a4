"""How fast `tink replay train` trains a model again, against the run itself.

A real worker with its embedded engine trains a model through the SDK, and then the command trains it again,
on a server of its own, while the worker has nothing to do: in turn, a new model each time. Compared are the
seconds of the same operations: for the run what the journal says of each (`run_ms`), without the pauses
between them; for the replay all of it, from the first operation to the last. Every result must be the same,
bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import tinker
from tinker import types

from tests.bench.figures import Figure
from tests.live import LiveServer
from tink.pretrained import BUILT_IN

SUMMARY = "a model's training once more, against the run itself"
RANK = 8
# Of the built-in model's vocabulary.
TOKENS = 400


class Pair(NamedTuple):
    """Seconds of the same operations; `whole` is the command's, from its start to its end."""

    recorded: float
    replayed: float
    whole: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of a model (20)")
    parser.add_argument("--batches", type=int, default=2, help="forward_backward jobs of a step (2)")
    parser.add_argument("--sequences", type=int, default=16, help="sequences of a batch (16)")
    parser.add_argument("--length", type=int, default=100, help="tokens of a sequence (100)")
    parser.add_argument("--runs", type=int, default=5, help="models; the median counts (5)")


def run(arguments: argparse.Namespace) -> Iterator[Figure]:
    # The built-in model's tokenizer is on no hub.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TINKER_TELEMETRY": "0"}
    with tempfile.TemporaryDirectory(prefix="tink-bench-") as folder:
        server = LiveServer(Path(folder) / "home")
        try:
            server.start()
            pairs = [_measure(server, arguments, seed) for seed in range(arguments.runs)]
        finally:
            server.close()
    recorded, replayed, whole = (median(seconds) for seconds in zip(*pairs, strict=True))
    yield Figure("rerun_seconds", replayed, "s", recorded)
    yield Figure("rerun_command", whole, "s", recorded)
    yield Figure("rerun_speed", median(pair.recorded / pair.replayed for pair in pairs), "times the run's")


def _measure(server: LiveServer, arguments: argparse.Namespace, seed: int) -> Pair:
    model = _train(server, arguments, seed)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tink.cli.main", "replay", "train", model, "--format", "json"],
        env={**os.environ, "TINK_HOME": str(server.home)},
        capture_output=True,
        text=True,
    )
    whole = time.monotonic() - began
    if done.returncode:
        raise SystemExit(f"tink replay train failed:\n{done.stdout}\n{done.stderr}")
    report = json.loads(done.stdout)
    return Pair(report["recorded_seconds"], report["seconds"], whole)


def _train(server: LiveServer, arguments: argparse.Namespace, seed: int) -> str:
    """As clients do: what comes next is there before what runs has ended."""
    rng = random.Random(seed)
    service = tinker.ServiceClient(base_url=server.url, api_key="tml-local")
    client = service.create_lora_training_client(base_model=BUILT_IN, rank=RANK, seed=seed).result()
    last: list[Any] = []
    for _ in range(arguments.steps):
        promises = [
            client.forward_backward(_batch(rng, arguments), "cross_entropy")
            for _ in range(arguments.batches)
        ]
        now = [*promises, client.optim_step(types.AdamParams(learning_rate=1e-3))]
        for promise in last:
            promise.result()
        last = now
    for promise in last:
        promise.result()
    return str(client.get_info().model_id)


def _batch(rng: random.Random, arguments: argparse.Namespace) -> list[types.Datum]:
    return [
        _datum([rng.randrange(TOKENS) for _ in range(arguments.length + 1)])
        for _ in range(arguments.sequences)
    ]


def _datum(tokens: list[int]) -> types.Datum:
    inputs: dict[str, Any] = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)
