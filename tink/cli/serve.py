"""`tink serve`: the worker. Here is what comes before its port is open; the rest is in serving.py."""

from __future__ import annotations

import argparse
import os
import resource
from collections.abc import Iterator

from tink import crash
from tink.cli.options import add_home
from tink.errors import StartupError
from tink.settings import Settings
from tink.trainer import engines
from tink.world import World

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

With TINK_DATABASE_URL the journal is in PostgreSQL. A second worker on the same
database waits and takes over when the first one ends, dies or hangs; when the
server is away, the worker waits for it, and its clients with it.

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
    add_home(parser, of="everything")
    parser.add_argument(
        "--no-auth",
        action="store_true",
        help="listen beyond loopback without API keys: everyone who reaches the port can do everything",
    )


def run(arguments: argparse.Namespace) -> int:
    settings = Settings.load(os.environ, host=arguments.host, port=arguments.port, home=arguments.home)
    if wrong := list(problems(settings, no_auth=arguments.no_auth)):
        raise StartupError("\n".join(wrong))
    crash.arm(settings.crash_at)
    _raise_file_limit()
    home, world = settings.home_folder, World()
    home.make()
    with home.lock():
        if wrong_place := home.misplaced():
            raise StartupError(wrong_place)
        # The port first: if it is taken, nothing has been started that would have to be stopped. The rest
        # takes a second to import: clients that come meanwhile wait that long, instead of being refused.
        with world.listen(settings.host, settings.port) as listener:
            if not home.database_url:
                from tink import http_server
                from tink.cli.serving import serve

                http_server.run(serve, settings, home, world, listener)
                return 0
        from tink.cli.standby import keep_serving

        keep_serving(settings, home, world)
    return 0


def problems(settings: Settings, *, no_auth: bool) -> Iterator[str]:
    """Why it cannot start with these settings here, a line each."""
    if settings.beyond_loopback and not settings.tenants and not no_auth:
        yield (
            f"{settings.host} can be reached from other machines: set TINK_API_KEYS=KEY=TENANT,... "
            "or pass --no-auth if you mean it"
        )
    if "hf" in settings.routes:
        try:
            engines.check("hf")
        except StartupError as error:
            yield str(error)


def _raise_file_limit() -> None:
    """Each pending result is an open connection: the soft limit of 1,024 is too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
