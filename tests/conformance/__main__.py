"""Runs the suite against a training server.

    python -m tests.conformance URL [--token T] [--restart 'COMMAND'] [--strict] [--only WORDS] [--json]

It makes models and files of its own there, and raises the lease at the end: run it against a server
that nobody else uses. One line per check, then the count; exit status 1 when a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import uuid
from typing import NamedTuple

import httpx
import trio

from tests.conformance.checks import CHECKS, Check
from tests.conformance.suite import NotRun, Server, Wrong


class Outcome(NamedTuple):
    """`state`: ok, FAIL or not run. `detail`: what was expected and what came, or what it needs."""

    check: str
    state: str
    detail: str
    warnings: list[str]
    seconds: float

    def __str__(self) -> str:
        line = f"{self.state:8}{self.check}" + (f": {self.detail}" if self.detail else "")
        return "\n".join([line, *(f"warning {self.check}: {text}" for text in self.warnings)])


async def outcome(server: Server, check: Check) -> Outcome:
    server.warnings = []
    began = trio.current_time()
    state, detail = "ok", ""
    try:
        await check(server)
    except* NotRun as reasons:
        state, detail = "not run", str(_innermost(reasons))
    except* Wrong as wrongs:
        state, detail = "FAIL", str(_innermost(wrongs))
    except* httpx.HTTPError as errors:
        state, detail = "FAIL", f"expected an answer, got {_innermost(errors)!r}"
    name = check.__name__.replace("_", " ")
    return Outcome(name, state, detail, server.warnings, round(trio.current_time() - began, 3))


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _restart(command: str) -> None:
    # Its output goes beside ours, which may be JSON.
    done = await trio.run_process(command, shell=True, stdout=sys.stderr.fileno(), check=False)
    if done.returncode:
        raise Wrong(f"the restart command ended with status {done.returncode}")


async def run(options: argparse.Namespace) -> int:
    checks = [check for check in CHECKS if options.only in check.__name__.replace("_", " ")]
    found: list[Outcome] = []
    async with httpx.AsyncClient(base_url=options.url, timeout=None, trust_env=False) as http:
        server = Server(
            http,
            f"conformance-{uuid.uuid4().hex[:8]}",
            token=options.token,
            restart=(lambda: _restart(options.restart)) if options.restart else None,
            tolerance=0.0 if options.strict else options.tolerance,
        )
        try:
            await server.connect()
        except (httpx.HTTPError, Wrong) as error:
            print(f"{options.url}: no training server to be checked: {error or error!r}", file=sys.stderr)
            return 2
        for check in checks:
            found.append(await outcome(server, check))
            if not options.json:
                print(found[-1], flush=True)
    states = [one.state for one in found]
    passed, failed = states.count("ok"), states.count("FAIL")
    if options.json:
        what = {
            "url": options.url,
            "engine": server.info.engine,
            "versions": server.info.versions,
            "base_model": server.info.base_model,
            "passed": passed,
            "failed": failed,
            "not_run": states.count("not run"),
            "checks": [one._asdict() for one in found],
        }
        print(json.dumps(what, indent=1))
    else:
        more = [f"{states.count('not run')} not run"] * ("not run" in states)
        warned = sum(len(one.warnings) for one in found)
        more += [f"{warned} warnings"] * bool(warned)
        print(", ".join([f"{passed} passed", f"{failed} failed", *more]))
    return 1 if failed or not passed else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tools/trainer-conformance",
        description="Checks that a training server keeps what tink-train/1 promises.",
    )
    parser.add_argument("url", metavar="URL")
    parser.add_argument(
        "--token",
        default=os.environ.get("TINK_TRAINER_TOKEN"),
        help="what its callers must carry (default: TINK_TRAINER_TOKEN)",
    )
    parser.add_argument(
        "--restart",
        metavar="COMMAND",
        help="a shell command that kills the server and starts it again, and returns",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        help="a difference up to this is a warning, relative above 1 (default: %(default)s)",
    )
    parser.add_argument("--strict", action="store_true", help="results must be equal bit for bit")
    parser.add_argument("--only", metavar="WORDS", default="", help="the checks whose name has these words")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    return trio.run(run, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
