"""The worker with its HTTP side, from an open port until it is told to stop."""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import structlog
import trio
from starlette.types import ASGIApp

import tink
from tink import http_server
from tink.actors.embedded import EmbeddedTrainer
from tink.actors.router import Router
from tink.actors.worker import open_worker
from tink.addresses import url_of
from tink.api.app import create_app
from tink.api.auth import Auth
from tink.cli.external import external
from tink.home import Home, WorkerRecord
from tink.journal import chain
from tink.journal.database import database
from tink.journal.journal import Journal
from tink.limits import COLLECT_OBJECTS, KEEP_ALIVE_SECONDS, STOPPING_SECONDS
from tink.logs import configure_logs, write_line
from tink.pretrained import BUILT_IN
from tink.settings import Settings
from tink.world import World

log = structlog.get_logger()


class Past:
    """Of the workers before in this process: the last event that was committed, whether one has `served`,
    and whether the process was told to stop. `serving`: one just does, or did until it failed."""

    def __init__(self) -> None:
        self.head = chain.NONE
        self.served = self.serving = self.stopped = False

    def stop(self, *_: object) -> None:
        self.stopped = True

    @contextmanager
    def of(self, journal: Journal) -> Iterator[None]:
        self.served = self.serving = True
        try:
            yield
        finally:
            self.head = journal.head


async def serve(
    settings: Settings, home: Home, world: World, listener: socket.socket, past: Past | None = None
) -> None:
    """The caller holds the home's lock. Raises StartupError, and JournalUnavailable at any time."""
    configure_logs(settings.log_level)
    past = past or Past()
    opening = Journal.open(
        home,
        world,
        version=tink.__version__,
        settings_digest=settings.digest,
        acknowledged=past.head,
    )
    async with opening as journal:
        with past.of(journal):
            await _run(journal, settings, home, world, listener, past)
    log.info("stopped")


async def _run(
    journal: Journal,
    settings: Settings,
    home: Home,
    world: World,
    listener: socket.socket,
    past: Past,
) -> None:
    embedded = None if settings.use_megatron else EmbeddedTrainer(settings, home, world)
    find = external(settings).find if embedded is None else embedded.find
    async with open_worker(journal, find, settings, world) as router:
        app = create_app(
            router.ask,
            auth=Auth(settings.tenants),
            artifacts=settings.artifact_root,
            secret=home.load_secret(),
            world=world,
        )
        with _rarely_collected():
            await _listen(app, listener, router, settings, home, past)
    if embedded is not None:
        await embedded.stop()


@contextmanager
def _rarely_collected() -> Iterator[None]:
    """What there is now stays; and requests leave hardly anything behind that only the collector finds."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(COLLECT_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


async def _listen(
    app: ASGIApp,
    listener: socket.socket,
    router: Router,
    settings: Settings,
    home: Home,
    past: Past,
) -> None:
    """Serves HTTP until SIGTERM or SIGINT, then lets what is in flight finish."""
    port = listener.getsockname()[1]
    # On all interfaces: this machine dials itself, and others its name.
    anywhere = settings.host in ("0.0.0.0", "::")  # noqa: S104  compared, not bound
    local = "127.0.0.1" if anywhere else settings.host
    public = socket.gethostname() if anywhere else settings.host
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(_await_signals, stop, past)
        if past.stopped:  # before anyone listened
            stop.set()
        async with trio.open_nursery() as serving:
            serve = partial(http_server.serve, app, listener, stop=stop)
            seconds = {"idle_seconds": KEEP_ALIVE_SECONDS, "last_seconds": STOPPING_SECONDS}
            await serving.start(partial(serve, **seconds))
            record = WorkerRecord(os.getpid(), url_of(local, port), tink.__version__, settings.routes.mode)
            home.announce(record)
            write_line(_banner(settings, home, url_of(public, port)), sys.stdout)
            try:
                await stop.wait()
            finally:
                home.withdraw()
            log.info("stopping", seconds=STOPPING_SECONDS)
            router.release_waiters()
        nursery.cancel_scope.cancel()


async def _await_signals(
    stop: trio.Event, past: Past, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            if stop.is_set():
                # The second one: what is open is in the journal, and the trainer ends by itself.
                write_line("tink serve: stopped at once")
                os._exit(128 + number)
            past.stop()
            stop.set()


def _banner(settings: Settings, home: Home, url: str) -> str:
    model = settings.hf_model_name or settings.hf_model or f"{BUILT_IN} (built in)"
    if settings.tenants:
        auth = f"API keys of {len(set(settings.tenants.values()))} tenant(s); clients pass TINKER_API_KEY"
        key = "tml-..."
    else:
        auth, key = "none: everyone who reaches the port is one tenant", "tml-local"
    rows = [("mode", settings.routes.mode)]
    if settings.use_megatron:
        rows.append(("trainer", f"{settings.megatron_server_url}, one training job at a time"))
    elif settings.routes.trainer:
        engine = f"embedded, HuggingFace engine, {settings.max_workers} adapters at once"
        rows += [("model", model), ("trainer", f"{engine}, log in {home.trainer_log}")]
    if settings.routes.sampling == "vllm":
        rows.append(("vllm", ", ".join(settings.vllm_urls)))
    rows += [
        ("database", database(home, "journal").place),
        ("artifacts", str(settings.artifact_root)),
        ("auth", auth),
        ("address", url),
        ("connect", f"export TINKER_BASE_URL={url} TINKER_API_KEY={key}"),
    ]
    return "\n".join([f"tink {tink.__version__}", *(f"  {name:<10}{value}" for name, value in rows)])
