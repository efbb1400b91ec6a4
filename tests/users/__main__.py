"""Many users at once, each of whom makes, trains and samples an adapter of its own through the REST API;
and before it the same users one after another. Each must get, to the last bit, what it got alone.

The server is a `tink serve` of its own with an empty home, which is deleted in the end, or the one at
--url. With --engine megatron it trains on a `tink trainer --engine megatron`, one job at a time.

The users are plain HTTP clients: the SDK would have threads and heartbeats of its own for each of them,
which take the time that is measured from a server on the same machine."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import httpx
import trio

from tests.live import LiveServer, LiveTrainer
from tests.users import report, trial
from tests.users.trial import FAIR, Trial
from tests.users.user import Work
from tink.cli import printing

EXAMPLES = """\
examples:
  tools/concurrent_users 4                              the embedded engine, MAX_WORKERS=4
  tools/concurrent_users 4 --at-least 1.5               fail if it is not so many times as fast
  MAX_WORKERS=1 tools/concurrent_users 4                one adapter after another
  tools/concurrent_users 4 --engine megatron --fair     one training job at a time; fail if it is unfair
  tools/concurrent_users 16 --url http://gpu-1:8400 --api-key tml-long-and-random

exit status: 0; 1 if a user failed or got other numbers than alone, or if what --at-least and
--fair ask for is not so; 2 if there is no server to use"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return _report(_hold(options), options)
    except (AssertionError, OSError, httpx.HTTPError) as error:
        print(f"concurrent_users: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("concurrent_users: interrupted, and everything stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/concurrent_users",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shown = "(%(default)s)"
    parser.add_argument("users", nargs="?", type=_positive, default=4, metavar="N", help=f"so many {shown}")
    parser.add_argument("--engine", choices=["hf", "megatron"], default="hf", help=f"that trains {shown}")
    parser.add_argument("--model", help="directory or hub id (the built-in one)")
    parser.add_argument("--url", help="a worker that runs: whatever it trains and samples on")
    parser.add_argument("--api-key", default="tml-local", help="for --url, if it wants one")
    parser.add_argument("--steps", type=_positive, default=10, help=f"of each user {shown}")
    parser.add_argument("--chats", type=_positive, default=16, help=f"that a step sees {shown}")
    parser.add_argument("--words", type=_positive, default=100, help=f"of each answer in them {shown}")
    parser.add_argument("--rank", type=_positive, default=8, help=f"of each adapter {shown}")
    parser.add_argument("--at-least", type=float, metavar="X", help="times as fast as one after another")
    parser.add_argument(
        "--fair",
        action="store_true",
        help=f"the p95 of what a user's steps waited is at most {FAIR:g} times the mean of all "
        "(not with --url: the journal has it)",
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="for home and logs (deleted in the end)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def _hold(options: argparse.Namespace) -> Trial:
    if options.url is not None:
        return trio.run(_through, options, options.url, options.api_key)
    keep = options.keep
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.TemporaryDirectory(prefix="tink-users-")
    with temporary if keep is None else nullcontext(keep) as folder:
        home = Path(folder) / "home"
        with _serving(home, options.engine, options.model) as url:
            found = trio.run(_through, options, url, "tml-local")
        return trial.with_journal(found, home / "journal.sqlite")


async def _through(options: argparse.Namespace, url: str, key: str) -> Trial:
    async with trial.client(url, key) as client:
        name = await trial.base_model(client)
        work = Work(name, options.steps, options.chats, options.words, options.rank)
        return await trial.hold(client, work, options.users)


@contextmanager
def _serving(home: Path, engine: str, model: str | None) -> Iterator[str]:
    """The address of a worker that is ready. Both processes are ended, whatever happens."""
    mode = {"USE_HF": "true", "USE_MEGATRON": "false"}
    # Should this process be killed and the worker after it, the trainer will not stay for long.
    others = {"USE_VLLM": "false", "TINK_API_KEYS": "", "TINK_TRAINER_ORPHAN_SECONDS": "60"}
    trainer = None
    if engine == "megatron":
        options = [] if model is None else ["--model", model]
        trainer = LiveTrainer(home, "--engine", "megatron", "--orphan-seconds", "60", *options)
        trainer.log = home.with_name("trainer.log")
        mode = {"USE_HF": "false", "USE_MEGATRON": "true", "MEGATRON_SERVER_URL": trainer.url}
    elif model is not None:
        others["TINK_HF_MODEL"] = model
    worker = LiveServer(home, **mode, **others)
    try:
        if trainer is not None:
            trainer.start()
            trainer.wait_until_ready()
        worker.start()
        yield worker.url
    finally:
        worker.close()
        if trainer is not None:
            trainer.kill()


def _report(found: Trial, options: argparse.Namespace) -> int:
    """The exit status."""
    problems = report.problems(found, options.at_least, options.fair)
    if options.json:
        printing.print_document(report.document(found) | {"problems": problems})
    else:
        report.show(found)
    for problem in problems:
        print(f"concurrent_users: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
