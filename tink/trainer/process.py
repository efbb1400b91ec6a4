"""The training server as a process: options, listening, signals, the end.

    python -m tink.trainer [--port N] [--artifacts DIR] ...
    torchrun --nproc-per-node N -m tink.trainer --engine megatron [--pipeline-parallel P] ...

It listens before the model is loaded, so that its supervisor sees it at once. SIGTERM lets the ops
that run finish (for TRAINER_GRACE seconds) and exits 0; SIGINT is ignored, because a Ctrl-C reaches
the whole process group and the supervisor decides what it means.

With --preload this process imports the engine first and then only waits, while a child of it serves; a
child that is killed is followed by another one at once (preload.py).
"""

from __future__ import annotations

import argparse
import gc
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import hypercorn.config
import hypercorn.trio
import msgspec
import structlog
import trio

from tink import crash, pretrained
from tink.errors import StartupError
from tink.limits import ORPHAN_LOOKS, TRAINER_GRACE, TRAINER_KEEP_ALIVE_SECONDS, TRAINER_LAST_SECONDS
from tink.logs import configure_logs, write_line
from tink.trainer import engines
from tink.trainer.artifacts import Artifacts
from tink.trainer.engines.interface import Engine
from tink.trainer.preload import Preloaded
from tink.trainer.server import Trainer, application
from tink.world import World

log = structlog.get_logger("tink.trainer")

# What of a hub's repository an engine reads.
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


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


class Ready(msgspec.Struct, frozen=True):
    """The ready file: written once the port is bound, before the model is loaded."""

    pid: int
    port: int
    incarnation: str


def run(options: Options, world: World | None = None) -> int:
    """Serves until told to stop; returns the exit status. StartupError before anything is bound."""
    crash.arm(options.crash_at)
    engines.check(options.engine, options.ranks, options.pipeline_parallel)
    _check(options)
    configure_logs("info")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    world = world or World()
    if options.rank:
        _follow(options, world)
    serve = partial(_listen, options, world)
    if not options.preload:
        return serve()
    _import_engine(options.engine)
    return Preloaded(serve, world).serve()


def _listen(options: Options, world: World) -> int:
    if options.preload:
        _begin_anew_for_cuda()
    with world.listen(options.host, options.port) as listener:
        trio.run(_serve, options, listener, world)
    return 0


def _begin_anew_for_cuda() -> None:
    """A process that was forked from one in which torch has looked at a GPU cannot use it. It becomes one
    that has imported nothing: the same in all but the seconds that this takes."""
    import torch

    if torch.cuda._is_in_bad_fork():
        log.info("torch is imported anew, for the GPU")
        words = [word for word in sys.orig_argv[1:] if word != "--preload"]
        # Where to crash was for the first process.
        environment = {name: value for name, value in os.environ.items() if name != "TINK_CRASH_AT"}
        os.execve(sys.executable, [sys.executable, *words], environment)  # noqa: S606  no shell


def _follow(options: Options, world: World) -> NoReturn:
    """Any rank but the first."""
    from tink.trainer.engines import lockstep

    engine = _load(options, world.new_id())
    group = lockstep.gather()
    # It reaches all of them. The first one finishes what runs, for which it needs the others; they end when
    # it has.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    lockstep.follow(engine, group)


def _check(options: Options) -> None:
    loopback = options.host == "localhost" or (
        _is_address(options.host) and ipaddress.ip_address(options.host).is_loopback
    )
    if not loopback and not options.token:
        raise StartupError(f"--host {options.host} lets other machines in: set TINK_TRAINER_TOKEN first")
    if options.slots < 1 or options.threads < 1:
        raise StartupError("--slots and --threads must be 1 or more")
    if options.micro_batch_tokens is not None and options.micro_batch_tokens < 1:
        raise StartupError("--micro-batch-tokens must be 1 or more")
    if options.preload and options.ranks > 1:
        raise StartupError(
            "--preload serves in another process when one is killed: torchrun has to start all"
        )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def _serve(options: Options, listener: socket.socket, world: World) -> None:
    port = listener.getsockname()[1]
    stop, close = trio.Event(), trio.Event()
    async with trio.open_nursery() as nursery:
        trainer = Trainer(world, options.slots, nursery)
        async with trio.open_nursery() as listening:
            app = application(trainer, options.token)
            serve = partial(hypercorn.trio.serve, app, _config(listener), shutdown_trigger=close.wait)
            await listening.start(serve)
            crash.point("trainer.bound")
            if options.ready_file is not None:
                _write_ready(options.ready_file, Ready(os.getpid(), port, trainer.incarnation))
            log.info("listening", host=options.host, port=port, incarnation=trainer.incarnation)
            nursery.start_soon(trainer.load, partial(_build, options, trainer.incarnation, world))
            nursery.start_soon(_await_sigterm, stop)
            if options.orphan_seconds:
                nursery.start_soon(_await_silence, trainer, options.orphan_seconds, stop)
            await stop.wait()
            with trio.move_on_after(TRAINER_GRACE) as grace:
                await trainer.finish()
            if trainer.health.state == "loading" or grace.cancelled_caught:
                # Threads cannot be stopped, and what they were computing is in the journal.
                log.warning("stopped with work unfinished")
                os._exit(0)
            close.set()
        nursery.cancel_scope.cancel()
    log.info("stopped")


def _config(listener: socket.socket) -> hypercorn.config.Config:
    config = hypercorn.config.Config()
    # hypercorn owns the socket from here, and closes it first when it stops.
    config.bind = [f"fd://{listener.detach()}"]
    config.errorlog = None
    config.keep_alive_timeout = TRAINER_KEEP_ALIVE_SECONDS
    config.graceful_timeout = TRAINER_LAST_SECONDS
    return config


@contextmanager
def _uncollected() -> Iterator[None]:
    """For what is made once and stays: to look through it for garbage again and again would take a fifth
    of the start."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@_uncollected()
def _import_engine(engine: str) -> None:
    """What `_build` would import, but for the classes of the model itself."""
    import_module("tink.trainer.tiny")
    import_module("tink.trainer.engines.lora_engine")
    engines.preload(engine)


def _build(options: Options, incarnation: str, world: World) -> Engine:
    """In a thread: importing torch and reading the model takes seconds."""
    if options.ranks == 1:
        return _load(options, incarnation)
    from tink.trainer.engines import lockstep

    # The others wait for this one, or have failed as well: who started them shall know.
    with lockstep.to_the_end():
        return lockstep.Leader(_load(options, incarnation), lockstep.gather(), world.lock())


@_uncollected()
def _load(options: Options, incarnation: str) -> Engine:
    from tink.trainer import tiny
    from tink.trainer.engines.lora_engine import LoraEngine

    crash.point("trainer.loading")
    if options.model is None:
        directory, name = tiny.ensure(options.home), tiny.NAME
        # It is on no hub, where clients would look for its tokenizer by its name.
        tiny.publish_tokenizer(directory)
    else:
        directory, name = pretrained.find(options.model, MODEL_FILES), options.model
    artifacts = Artifacts(options.artifacts or options.home / "artifacts", incarnation)
    base = engines.load_base(
        options.engine,
        directory,
        options.model_name or name,
        options.dtype,
        options.ranks,
        options.pipeline_parallel,
    )
    return LoraEngine(base, artifacts, options.threads, options.micro_batch_tokens)


def _write_ready(path: Path, ready: Ready) -> None:
    scratch = path.with_name(f"{path.name}.{ready.pid}")
    scratch.write_bytes(msgspec.json.encode(ready))
    scratch.replace(path)


async def _await_sigterm(stop: trio.Event) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            log.info("told to stop")
            stop.set()


async def _await_silence(trainer: Trainer, seconds: float, stop: trio.Event) -> None:
    """A worker that was killed leaves its child behind; the child notices by itself."""
    quiet = 0
    while quiet < ORPHAN_LOOKS:
        called_at = trainer.called_at
        await trio.sleep(seconds / ORPHAN_LOOKS)
        quiet = quiet + 1 if trainer.called_at == called_at else 0
    log.info("no worker has called", seconds=seconds)
    stop.set()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    home = Path(os.environ.get("TINK_HOME") or Path.home() / ".tink")
    shown = "default: %(default)s"
    parser.add_argument(
        "--engine",
        choices=list(engines.KINDS),
        default="hf",
        help=f"what holds the base model: transformers, or megatron-core, which torchrun may start on "
        f"several processes ({shown})",
    )
    parser.add_argument("--home", type=Path, default=home, help=shown)
    parser.add_argument("--host", default="127.0.0.1", help=shown)
    parser.add_argument("--port", type=int, default=0, help="0 (default): any free one")
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
        default=1,
        metavar="P",
        help="of N processes that torchrun starts, N / P have slices of the same layers (tensor parallel), "
        f"and the model's layers are in P stages ({shown})",
    )
    parser.add_argument("--slots", type=int, default=4, help=f"models that compute at once ({shown})")
    parser.add_argument("--threads", type=int, default=1, help=f"of torch, for each of them ({shown})")
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
        default=0.0,
        help="end when no worker has called for so long; 0 (default): never",
    )


def options(arguments: argparse.Namespace) -> Options:
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tink trainer", description="Tink's training server.")
    add_arguments(parser)
    try:
        return run(options(parser.parse_args(arguments)))
    except StartupError as error:
        write_line(f"tink trainer: {error}")
        return 2
