"""The training server as a process: listening, signals, the end.

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
import os
import signal
import socket
import sys
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

import msgspec
import structlog
import trio

from tink import crash, files, http_server
from tink.errors import StartupError
from tink.limits import ORPHAN_LOOKS, TRAINER_GRACE, TRAINER_KEEP_ALIVE_SECONDS, TRAINER_LAST_SECONDS
from tink.logs import configure_logs, write_line
from tink.trainer import build
from tink.trainer.options import Options, add_arguments, check, parsed
from tink.trainer.preload import Preloaded
from tink.trainer.server import application
from tink.trainer.trainer import Trainer
from tink.wire.ready import Ready
from tink.world import World

log = structlog.get_logger("tink.trainer")


def run(options: Options, world: World | None = None) -> int:
    """Serves until told to stop, and ends the process; of a preloading one, returns its exit status.
    StartupError before anything is bound."""
    crash.arm(options.crash_at)
    check(options)
    configure_logs("info")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    world = world or World()
    if options.rank:
        _follow(options, world)
    serve = partial(_listen, options, world)
    if not options.preload:
        return serve()
    build.import_engine(options.engine)
    return Preloaded(serve, world).serve()


def _listen(options: Options, world: World) -> NoReturn:
    if options.preload:
        _begin_anew_for_cuda()
    with world.listen(options.host, options.port) as listener:
        http_server.run(_serve, options, listener, world)
    # Not an orderly exit, in which the threads of torch's groups sometimes abort (lockstep.leave): all that
    # is worth keeping is in files, and the logs have no buffer.
    os._exit(0)


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

    engine = build.load(options, world.new_id())
    group = lockstep.gather()
    # It reaches all of them. The first one finishes what runs, for which it needs the others; they end when
    # it has.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    lockstep.follow(engine, group)


async def _serve(options: Options, listener: socket.socket, world: World) -> None:
    port = listener.getsockname()[1]
    stop, close = trio.Event(), trio.Event()
    async with trio.open_nursery() as nursery:
        trainer = Trainer(world, options.slots, nursery)
        async with trio.open_nursery() as listening:
            app = application(trainer, options.token)
            serve = partial(http_server.serve, app, listener, stop=close)
            seconds = {"idle_seconds": TRAINER_KEEP_ALIVE_SECONDS, "last_seconds": TRAINER_LAST_SECONDS}
            await listening.start(partial(serve, **seconds))
            crash.point("trainer.bound")
            if options.ready_file is not None:
                ready = Ready(os.getpid(), port, trainer.incarnation)
                files.write(options.ready_file, msgspec.json.encode(ready))
            log.info("listening", host=options.host, port=port, incarnation=trainer.incarnation)
            nursery.start_soon(trainer.load, partial(build.engine, options, trainer.incarnation, world))
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tink trainer", description="Tink's training server.")
    add_arguments(parser)
    try:
        return run(parsed(parser.parse_args(arguments)))
    except StartupError as error:
        write_line(f"tink trainer: {error}")
        return 2
