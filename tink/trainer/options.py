"""How a training server is started: its options, and what is wrong with them."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tink.addresses import is_loopback
from tink.errors import StartupError
from tink.trainer import engines


@dataclass(frozen=True)
class Options:
    """`model` None: the built-in tiny one, made under `home`. `artifacts` None: `home`/artifacts.
    `orphan_seconds`: exit when no worker has called for so long; 0 is never. `token`: what callers
    must carry, needed to listen on anything but loopback. `pipeline_parallel`: stages of layers, each on
    `ranks` / `pipeline_parallel` processes. `preload`: serve in a child, and in another one
    when that is killed. `crash_at`: TINK_CRASH_AT. `rank` of `ranks`: RANK and WORLD_SIZE, as torchrun sets
    them; the first rank serves."""

    home: Path
    engine: str = "hf"
    host: str = "127.0.0.1"
    port: int = 0
    artifacts: Path | None = None
    model: str | None = None
    model_name: str | None = None
    dtype: str | None = None
    pipeline_parallel: int = 1
    slots: int = 4
    threads: int = 1
    micro_batch_tokens: int | None = None
    ready_file: Path | None = None
    orphan_seconds: float = 0.0
    preload: bool = False
    token: str | None = None
    crash_at: str = ""
    rank: int = 0
    ranks: int = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    home = Path(os.environ.get("TINK_HOME") or Path.home() / ".tink")
    shown = "default: %(default)s"
    parser.add_argument(
        "--engine",
        choices=list(engines.KINDS),
        default=Options.engine,
        help=f"what holds the base model: transformers, or megatron-core, which torchrun may start on "
        f"several processes ({shown})",
    )
    parser.add_argument("--home", type=Path, default=home, help=shown)
    parser.add_argument("--host", default=Options.host, help=shown)
    parser.add_argument("--port", type=int, default=Options.port, help="0 (default): any free one")
    parser.add_argument("--artifacts", type=Path, help="default: artifacts under the home")
    parser.add_argument("--model", help="directory or hub name; default: the built-in tiny one")
    parser.add_argument("--model-name", help="the name it is served under; default: MODEL")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of the frozen base (default: float32 on a CPU, bfloat16 on a GPU)",
    )
    parser.add_argument(
        "--pipeline-parallel",
        type=int,
        default=Options.pipeline_parallel,
        metavar="P",
        help="of N processes that torchrun starts, N / P have slices of the same layers (tensor parallel), "
        f"and the model's layers are in P stages ({shown})",
    )
    parser.add_argument(
        "--slots", type=int, default=Options.slots, help=f"models that compute at once ({shown})"
    )
    parser.add_argument(
        "--threads", type=int, default=Options.threads, help=f"of torch, for each of them ({shown})"
    )
    parser.add_argument(
        "--micro-batch-tokens",
        type=int,
        help="padded tokens that are computed at once; a longer sequence keeps little and computes twice "
        "(default: 4096 on a CPU, what fits on a GPU)",
    )
    parser.add_argument("--ready-file", type=Path, help="written once the port is bound: pid, port")
    parser.add_argument(
        "--preload",
        action="store_true",
        help="import the engine first, then serve in a child: if that is killed, in another one at once",
    )
    parser.add_argument(
        "--orphan-seconds",
        type=float,
        default=Options.orphan_seconds,
        help="end when no worker has called for so long; 0 (default): never",
    )


def parsed(arguments: argparse.Namespace) -> Options:
    """What `add_arguments` parsed. The token comes by the environment: everyone can see an option."""
    # torchrun gives those that it starts again the same environment: a crash point is the first ones'.
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    environment: dict[str, Any] = {
        "token": os.environ.get("TINK_TRAINER_TOKEN") or None,
        "crash_at": os.environ.get("TINK_CRASH_AT", "") if first else "",
        "rank": int(os.environ.get("RANK", 0)),
        "ranks": int(os.environ.get("WORLD_SIZE", 1)),
    }
    given = {
        field.name: getattr(arguments, field.name)
        for field in fields(Options)
        if field.name not in environment
    }
    return Options(**given, **environment)


def check(options: Options) -> None:
    """StartupError for what cannot work."""
    engines.check(options.engine, options.ranks, options.pipeline_parallel)
    if not is_loopback(options.host) and not options.token:
        raise StartupError(f"--host {options.host} lets other machines in: set TINK_TRAINER_TOKEN first")
    if options.slots < 1 or options.threads < 1:
        raise StartupError("--slots and --threads must be 1 or more")
    if options.micro_batch_tokens is not None and options.micro_batch_tokens < 1:
        raise StartupError("--micro-batch-tokens must be 1 or more")
    if options.preload and options.ranks > 1:
        raise StartupError(
            "--preload serves in another process when one is killed: torchrun has to start all"
        )
