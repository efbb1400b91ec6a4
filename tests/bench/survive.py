"""A run of training whose server is killed in its middle, against the same run undisturbed: by the
unmodified SDK, which knows nothing of it. Told are the client's errors, steps whose loss differs and by how
much, and the longest wait for a step.

Without `--url` it is Tink: a real `tink serve` with its embedded engine, both killed with -9 while a step
is under way and started again. With `--url` it is any server that speaks to the SDK, and `--kill` and
`--start` are commands that kill it and start it again."""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import tinker
from tinker import types

from tests.bench.figures import Figure
from tests.live import LiveServer
from tests.processes import kill_trainers

SUMMARY = "a run whose server is killed, against the same undisturbed; of other servers too"
RANK, TOKENS, SEQUENCES = 8, 60, 4
# Token ids that any vocabulary has.
VOCABULARY = 250


class Server(NamedTuple):
    url: str
    kill: Callable[[], object]
    start: Callable[[], object]


class Run(NamedTuple):
    """Of each step its loss, None if the client got an error; and the longest wait, in seconds."""

    losses: list[float | None]
    longest: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (20)")
    parser.add_argument("--kills", type=int, default=3, help="how often the server is killed (3)")
    parser.add_argument("--url", help="of another server; then --kill and --start are needed")
    parser.add_argument("--kill", metavar="COMMAND", help="kills it, as a crash would")
    parser.add_argument("--start", metavar="COMMAND", help="starts it again; it may return before it is up")


def run(arguments: argparse.Namespace) -> Iterator[Figure]:
    if arguments.url and not (arguments.kill and arguments.start):
        raise SystemExit("--url needs --kill and --start")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TINKER_TELEMETRY": "0"}
    with _other(arguments) if arguments.url else _tink() as server:
        quiet = train(server, arguments.steps, [])
        kills = [
            (number + 1) * arguments.steps // (arguments.kills + 1) for number in range(arguments.kills)
        ]
        killed = train(server, arguments.steps, kills)
    pairs = [(a, b) for a, b in zip(killed.losses, quiet.losses, strict=True) if a is not None]
    differences = [abs(a - b) for a, b in pairs if b is not None]
    yield Figure("kills", len(kills), "kills")
    yield Figure("client_errors", killed.losses.count(None), "steps", quiet.losses.count(None))
    yield Figure("different_losses", sum(difference > 0 for difference in differences), "steps")
    yield Figure("largest_difference", max(differences, default=0.0), "of the loss")
    yield Figure("longest_wait", killed.longest, "s", quiet.longest)


@contextmanager
def _tink() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="tink-bench-") as name:
        live = LiveServer(Path(name) / "home")
        live.start()

        def kill() -> None:
            live.kill()
            kill_trainers(live.home)

        try:
            yield Server(live.url, kill, lambda: live.start(wait=False))
        finally:
            live.close()


@contextmanager
def _other(arguments: argparse.Namespace) -> Iterator[Server]:
    def shell(command: str) -> Callable[[], object]:
        return lambda: subprocess.run(command, shell=True, check=False)

    yield Server(arguments.url, shell(arguments.kill), shell(arguments.start))


def train(server: Server, steps: int, kills: list[int]) -> Run:
    service = tinker.ServiceClient(
        base_url=server.url, api_key=os.environ.get("TINKER_API_KEY", "tml-local")
    )
    model = service.get_server_capabilities().supported_models[0].model_name
    client = service.create_lora_training_client(model, rank=RANK, seed=1).result()
    losses: list[float | None] = []
    longest = 0.0
    for step in range(steps):
        began = time.monotonic()
        try:
            sent = [
                client.forward_backward(batch(step), "cross_entropy"),
                client.optim_step(types.AdamParams()),
            ]
            if step in kills:
                server.kill()
                server.start()
            loss = sent[0].result().metrics["loss:sum"]
            sent[1].result()
            losses.append(float(loss))
        except Exception as error:
            print(f"step {step}: {type(error).__name__}: {error}")
            losses.append(None)
        longest = max(longest, time.monotonic() - began)
    return Run(losses, longest)


def batch(step: int) -> list[types.Datum]:
    rng, found = random.Random(step), []
    for _ in range(SEQUENCES):
        tokens = [rng.randrange(1, VOCABULARY) for _ in range(TOKENS + 1)]
        inputs: Any = {"target_tokens": tokens[1:], "weights": [1.0] * TOKENS}
        ids = types.ModelInput.from_ints(tokens[:-1])
        found.append(types.Datum(model_input=ids, loss_fn_inputs=inputs))
    return found
