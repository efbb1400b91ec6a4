"""`tink serve`: the worker, with its HTTP side, until it is told to stop."""

from __future__ import annotations

import argparse
import os
import resource
import signal
import socket
import sys
from functools import partial
from pathlib import Path

import hypercorn.config
import hypercorn.trio
import msgspec
import structlog
import trio
from starlette.applications import Starlette

import tink
from tink import crash
from tink.actors.embedded import EmbeddedTrainer
from tink.actors.router import Router
from tink.actors.worker import open_worker
from tink.api.app import create_app
from tink.api.auth import Auth
from tink.errors import StartupError
from tink.journal.home import Home, WorkerRecord
from tink.journal.journal import Journal
from tink.limits import BACKLOG
from tink.logs import configure_logs
from tink.settings import Settings
from tink.trainer.process import check_engine
from tink.world import World

# Requests in flight get this long to be answered after SIGTERM; polls are told to come again.
DRAIN_SECONDS = 10.0

log = structlog.get_logger()


HELP = "run the worker"
DESCRIPTION = """\
Runs the worker: serves the Tinker API, journals every job, and starts the
training server of the embedded engine as a child process. Everything it keeps
is under the home."""
EPILOG = """\
Everything else is set by environment variables (TINK_API_KEYS, TINK_HF_MODEL,
MAX_WORKERS, ...); README.md lists them. An option wins over its variable.

examples:
  tink serve                                  a tiny built-in model, port 8400
  TINK_HF_MODEL=Qwen/Qwen3-0.6B tink serve    a hub id or a directory
  TINK_API_KEYS=tml-s3cret=alice tink serve --host 0.0.0.0

signals: SIGTERM or Ctrl-C lets requests in flight finish; a second one stops at
once. Neither loses a job.

exit status: 0 after a stop; 2 if it cannot start; 3 if the journal could not be
written (start it again)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument("--host", help="address to listen on (TINK_HOST; default 127.0.0.1)")
    parser.add_argument(
        "--port", type=int, help="port to listen on, 0 for a free one (TINK_PORT; default 8400)"
    )
    parser.add_argument("--home", type=Path, help="folder of everything (TINK_HOME; default ~/.tink)")
    parser.add_argument(
        "--no-auth",
        action="store_true",
        help="listen beyond loopback without API keys: everyone who reaches the port can do everything",
    )


def run(arguments: argparse.Namespace) -> int:
    settings = Settings.load(os.environ, host=arguments.host, port=arguments.port, home=arguments.home)
    if settings.beyond_loopback and not settings.tenants and not arguments.no_auth:
        raise StartupError(
            f"{settings.host} can be reached from other machines: set TINK_API_KEYS=KEY=TENANT,... "
            "or pass --no-auth if you mean it"
        )
    if settings.use_megatron or settings.use_vllm:
        raise StartupError(
            "this version serves the embedded engine only: unset USE_MEGATRON and USE_VLLM "
            "(Megatron and vLLM backends are not there yet)"
        )
    if "hf" in settings.routes:
        check_engine()
    crash.arm(settings.crash_at)
    configure_logs(settings.log_level)
    _raise_file_limit()
    trio.run(_serve, settings, World())
    return 0


async def _serve(settings: Settings, world: World) -> None:
    home = Home(settings.home)
    home.make()
    # The port first: if it is taken, nothing has been started that would have to be stopped.
    with home.lock(), world.listen(settings.host, settings.port) as listener:
        async with Journal.open(
            home, world, version=tink.__version__, settings_digest=settings.digest
        ) as journal:
            trainer = EmbeddedTrainer(settings, home, world)
            async with open_worker(journal, trainer.find, settings, world) as router:
                app = create_app(
                    router.ask,
                    auth=Auth(settings.tenants),
                    artifacts=settings.artifact_root,
                    secret=home.load_secret(),
                    world=world,
                )
                await _listen(app, listener, router, settings, home, trainer)
            await trainer.stop()
    log.info("stopped")


async def _listen(
    app: Starlette,
    listener: socket.socket,
    router: Router,
    settings: Settings,
    home: Home,
    trainer: EmbeddedTrainer,
) -> None:
    """Serves HTTP until SIGTERM or SIGINT, then lets what is in flight finish."""
    port = listener.getsockname()[1]
    # On all interfaces: this machine dials itself, and others its name.
    anywhere = settings.host in ("0.0.0.0", "::")  # noqa: S104  compared, not bound
    local = "127.0.0.1" if anywhere else settings.host
    public = socket.gethostname() if anywhere else settings.host
    config = hypercorn.config.Config()
    # hypercorn owns the socket from here, and closes it first when it stops.
    config.bind = [f"fd://{listener.detach()}"]
    config.errorlog = None
    config.accesslog = None
    # Above the SDK's 45 s for one poll.
    config.keep_alive_timeout = 75.0
    config.graceful_timeout = DRAIN_SECONDS
    config.backlog = BACKLOG
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(_await_signals, stop)
        async with trio.open_nursery() as serving:
            serve = partial(hypercorn.trio.serve, app, config, shutdown_trigger=stop.wait, mode="asgi")
            await serving.start(serve)
            record = WorkerRecord(os.getpid(), _url(local, port), tink.__version__, settings.routes.mode)
            home.worker.write_bytes(msgspec.json.encode(record))
            print(_banner(settings, _url(public, port), trainer), flush=True)
            try:
                await stop.wait()
            finally:
                home.worker.unlink(missing_ok=True)
            log.info("stopping", drain_seconds=DRAIN_SECONDS)
            router.release_waiters()
        nursery.cancel_scope.cancel()


async def _await_signals(
    stop: trio.Event, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            if stop.is_set():
                # The second one: what is open is in the journal, and the trainer ends by itself.
                print("tink serve: stopped at once", file=sys.stderr, flush=True)
                os._exit(128 + number)
            stop.set()


def _banner(settings: Settings, url: str, trainer: EmbeddedTrainer) -> str:
    model = settings.hf_model_name or settings.hf_model or "tink/qwen3-tiny (built in)"
    if settings.tenants:
        auth = f"API keys of {len(set(settings.tenants.values()))} tenant(s); clients pass TINKER_API_KEY"
        key = "tml-..."
    else:
        auth, key = "none: everyone who reaches the port is one tenant", "tml-local"
    rows = [
        ("mode", settings.routes.mode),
        ("model", model),
        (
            "trainer",
            f"embedded, HuggingFace engine, {settings.max_workers} adapters at once, "
            f"log in {trainer.log_file}",
        ),
        ("database", f"SQLite, {settings.home / 'journal.sqlite'}"),
        ("artifacts", str(settings.artifact_root)),
        ("auth", auth),
        ("address", url),
        ("connect", f"export TINKER_BASE_URL={url} TINKER_API_KEY={key}"),
    ]
    return "\n".join([f"tink {tink.__version__}", *(f"  {name:<10}{value}" for name, value in rows)])


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _raise_file_limit() -> None:
    """Each pending result is an open connection: the soft limit of 1,024 is too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
