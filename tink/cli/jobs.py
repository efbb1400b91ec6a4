"""`tink jobs`: the jobs of a journal, and everything that is known of one of them."""

from __future__ import annotations

import argparse
import datetime
import re
from typing import Any, NamedTuple, get_args

import msgspec

from tink.cli import printing
from tink.cli.homes import find_home
from tink.cli.options import add_home, positive
from tink.domain import rows
from tink.domain.events import Record
from tink.domain.requests import OpName
from tink.errors import NotFound
from tink.journal import queries
from tink.journal.reader import open_journal
from tink.journal.store import event_row
from tink.world import World

HELP = "list jobs, or show one with its events"
DESCRIPTION = """\
Lists the jobs of a journal, newest first; 'tink jobs show ID' prints one of
them with its times, its result and its events. Works whether the worker runs
or not, and never disturbs it."""
EPILOG = """\
examples:
  tink jobs                                the last 20
  tink jobs --state open                   what waits or runs
  tink jobs --failed --since 1d            what failed since yesterday, and why
  tink jobs --model ID --op optim_step --limit 500 --json
  tink jobs show 0123456789abcdef0123456789abcdef:train:0:7

exit status: 0; 2 if there is no such home, journal or job"""

STATES = ("open", *get_args(rows.JobState))
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class Times(NamedTuple):
    """`queue_seconds`: from a job's acceptance to the start of its last attempt, or until now;
    `run_seconds`: what the backend says it took; `idle_seconds`: for how long the trainer had nothing to do
    just before; `total_seconds`: from its acceptance to its end."""

    queue_seconds: float | None
    run_seconds: float | None
    idle_seconds: float | None
    total_seconds: float | None


class JobLine(msgspec.Struct, kw_only=True):
    """A job in a list: columns of `jobs`, and its Times."""

    job_id: str
    tenant: str
    op: str
    state: str
    session_id: str | None
    model_id: str | None
    sampler_id: str | None
    seq_id: int
    op_no: int | None
    attempts: int
    submitted_at: float
    started_at: float | None
    finished_at: float | None
    queue_seconds: float | None
    run_seconds: float | None
    idle_seconds: float | None
    total_seconds: float | None
    tokens_in: int
    tokens_out: int
    loss_sum: float | None
    error_category: str | None
    error: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_common(parser, default=None)
    parser.add_argument("--state", choices=STATES, help="only these; open: accepted or running")
    parser.add_argument(
        "--failed", action="store_const", const="failed", dest="state", help="--state failed"
    )
    parser.add_argument(
        "--op", choices=get_args(OpName), metavar="OP", help="only this operation: %(choices)s"
    )
    parser.add_argument("--model", metavar="ID", help="only jobs of this model, samples of it included")
    parser.add_argument("--session", metavar="ID", help="only jobs of this session")
    parser.add_argument(
        "--since",
        metavar="TIME",
        type=since,
        help="only jobs submitted since: 30s, 15m, 6h, 2d, 1w ago, or 2026-01-31 or 2026-01-31T12:00",
    )
    parser.add_argument(
        "--limit", metavar="N", type=positive, default=20, help="at most so many (default: %(default)s)"
    )
    parser.set_defaults(run=run_list)
    actions = parser.add_subparsers(metavar="show ID", title="one job", help="instead of a list")
    showing = actions.add_parser(
        "show",
        help="one job: times, attempts, tokens, loss, error, result, and its events in order",
        description="Prints one job with its events, in order. Never a body.",
    )
    showing.add_argument("id", metavar="ID", help="the job's id, as 'tink jobs' prints it")
    _add_common(showing, default=argparse.SUPPRESS)
    showing.set_defaults(run=run_show)


def _add_common(parser: argparse.ArgumentParser, default: Any) -> None:
    add_home(parser, default=default)
    parser.add_argument(
        "--json",
        action="store_true",
        default=False if default is None else default,
        help="one JSON document instead of a table",
    )


def since(text: str) -> float:
    """A time as a person says it, in seconds since the epoch."""
    ago = re.fullmatch(r"(\d{1,9})([smhdw])", text)
    if ago is not None:
        return World().now() - int(ago[1]) * _UNITS[ago[2]]
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a time: 30s, 15m, 6h, 2d, 1w, 2026-01-31 or 2026-01-31T12:00 are"
        ) from None


def run_list(arguments: argparse.Namespace) -> int:
    with open_journal(find_home(arguments.home)) as connection:
        found = queries.jobs(
            connection,
            limit=arguments.limit + 1,
            state=arguments.state,
            op=arguments.op,
            model_id=arguments.model,
            session_id=arguments.session,
            since=arguments.since,
        )
    now = World().now()
    lines = [job_line(job, now) for job in found[: arguments.limit]]
    more = len(found) > arguments.limit
    if arguments.json:
        printing.print_document({"jobs": lines, "more": more})
        return 0
    if not lines:
        print("no such jobs")
        return 0
    print_jobs(lines, now)
    if more:
        print(f"... and older ones: --limit {arguments.limit} is reached")
    return 0


def job_line(job: rows.Job, now: float) -> JobLine:
    copied: dict[str, Any] = {
        name: getattr(job, name) for name in JobLine.__struct_fields__ if hasattr(job, name)
    }
    return JobLine(**copied, **times(job, now)._asdict())


def times(job: rows.Job, now: float) -> Times:
    queue_ms = job.queued_ms(job.finished_at or now) if job.queue_ms is None else job.queue_ms
    return Times(
        queue_seconds=queue_ms / 1000,
        run_seconds=None if job.run_ms is None else job.run_ms / 1000,
        idle_seconds=None if job.idle_ms is None else job.idle_ms / 1000,
        total_seconds=None if job.finished_at is None else job.finished_at - job.submitted_at,
    )


def print_jobs(lines: list[JobLine], now: float, title: str | None = None) -> None:
    numbers = ("TRIES", "QUEUE", "RUN", "TOKENS", "LOSS")
    table = printing.table("JOB", "OP", "STATE", "SUBMITTED", *numbers, "ERROR", title=title, right=numbers)
    for job in lines:
        tokens = job.tokens_in + job.tokens_out
        table.add_row(
            printing.text(job.job_id),
            job.op,
            printing.state(job.state),
            printing.ago(now - job.submitted_at),
            str(job.attempts),
            printing.duration(job.queue_seconds),
            printing.duration(job.run_seconds),
            printing.number(tokens) if tokens else "-",
            printing.number(job.loss_sum),
            "" if job.error is None else printing.text(f"{job.error_category}: {job.error}"),
        )
    printing.console(printing.LIST_COLUMNS).print(table)


# -- one job ----------------------------------------------------------------------------------------


def run_show(arguments: argparse.Namespace) -> int:
    with open_journal(find_home(arguments.home)) as connection:
        job = queries.job(connection, arguments.id)
        if job is None:
            raise NotFound(f"there is no job {arguments.id[:200]!r}: 'tink jobs' lists them")
        records = queries.events_of(connection, job.job_id)
    now = World().now()
    if arguments.json:
        document = {**msgspec.structs.asdict(job), **times(job, now)._asdict()}
        printing.print_document({"job": document, "events": [event_row(record) for record in records]})
        return 0
    _print_job(job, records, now)
    return 0


def _print_job(job: rows.Job, records: list[Record], now: float) -> None:
    taken = times(job, now)
    facts = printing.facts()
    facts.add_row("job", printing.text(job.job_id))
    facts.add_row("op", job.op)
    facts.add_row("state", printing.state(job.state))
    for name in (
        "tenant",
        "session_id",
        "model_id",
        "sampler_id",
        "seq_id",
        "op_no",
        "backend",
        "attempts",
    ):
        value = getattr(job, name)
        if value is not None:
            facts.add_row(name.removesuffix("_id") if name != "seq_id" else name, printing.text(value))
    for name in ("submitted_at", "started_at", "finished_at"):
        facts.add_row(name.removesuffix("_at"), printing.moment(getattr(job, name)))
    facts.add_row(
        "times",
        f"queue {printing.duration(taken.queue_seconds)}, run {printing.duration(taken.run_seconds)}, "
        f"total {printing.duration(taken.total_seconds)}",
    )
    if taken.idle_seconds is not None:
        facts.add_row("trainer", f"idle for {printing.duration(taken.idle_seconds)} before it")
    facts.add_row("tokens", f"{job.tokens_in:,} in, {job.tokens_out:,} out")
    if job.loss_sum is not None:
        facts.add_row("loss sum", repr(job.loss_sum))
    if job.seed is not None:
        facts.add_row("seed", str(job.seed))
    facts.add_row("request", _stored(job.body_sha256, job.body_bytes))
    if job.directory is not None:
        facts.add_row("directory", printing.text(job.directory))
    if job.error is not None:
        facts.add_row("error", f"[red]{printing.text(job.error_category)}: {printing.text(job.error)}[/]")
    if job.result is not None:
        facts.add_row("result", printing.text(msgspec.json.encode(job.result).decode()))
    elif job.result_sha256 is not None:
        facts.add_row("result", _stored(job.result_sha256, job.result_bytes))
    console = printing.console()
    console.print(facts)
    console.print()
    table = printing.table("SEQ", "AT", "WORKER", "EVENT", "DATA", right=("SEQ", "WORKER"))
    for record in records:
        row = event_row(record)
        data = {name: value for name, value in row["data"].items() if value not in (None, "", {}, [])}
        table.add_row(
            str(record.seq),
            printing.moment(record.at),
            str(record.incarnation),
            row["kind"],
            printing.text(msgspec.json.encode(data).decode()),
        )
    console.print(table)


def _stored(digest: str | None, size: int) -> str:
    return f"{size:,} bytes" + ("" if digest is None else f", sha256 {digest}")
