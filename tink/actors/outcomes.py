"""How jobs ended, for those who wait for it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import structlog

from tink.actors.books import JobBooks
from tink.actors.reply import Reply
from tink.domain import messages, rows
from tink.errors import NotFound, Overloaded, TinkError

log = structlog.get_logger()

# Of a job's row, in its log line.
FIGURES = (
    *("op_no", "queue_ms", "run_ms", "idle_ms"),
    *("tokens_in", "tokens_out", "loss_sum", "error_category"),
)


class Outcomes:
    """Each job's outcome, from the journal, and the replies that are kept until it is there."""

    def __init__(self, journal: JobBooks) -> None:
        self._journal = journal
        self._waiters: defaultdict[str, list[Reply[messages.Outcome]]] = defaultdict(list)

    def keep(self, job_id: str, reply: Reply[messages.Outcome]) -> None:
        """Until `announce`: the job is open."""
        waiting = [other for other in self._waiters[job_id] if not other.abandoned]
        self._waiters[job_id] = [*waiting, reply]

    async def announce(self, job_id: str) -> None:
        """The job's terminal event is durable: says so, to those who wait and in the log."""
        waiters = self._waiters.pop(job_id, [])
        job = await self._journal.job(job_id)
        assert job is not None, "it has just ended"
        if waiters:
            try:
                outcome = await self.of(job)
            except TinkError as error:
                for reply in waiters:
                    reply.fail(error)
            else:
                for reply in waiters:
                    reply.set(outcome)
        log.info("job", **job_line(job))

    async def of(self, job: rows.Job) -> messages.Outcome:
        """Of a job that has ended. Raises NotFound if its result is lost."""
        body: bytes | None = None
        if job.result_sha256 is not None:
            try:
                body = await self._journal.bodies.get(job.result_sha256)
            except LookupError as error:
                raise NotFound(f"the result of {job.job_id} is lost: {error}") from None
        return messages.Outcome(
            op=job.op,
            state=job.state,
            result=job.result,
            body=body,
            category=job.error_category,
            error=job.error,
        )

    def release(self) -> None:
        """The worker is stopping: whoever waits is told to ask again, of the next one."""
        for replies in self._waiters.values():
            for reply in replies:
                reply.fail(Overloaded("the worker is stopping: ask again"))
        self._waiters.clear()


def job_line(job: rows.Job) -> dict[str, Any]:
    """An ended job in one log line: ids, times (ms) and counts; never a body."""
    line: dict[str, Any] = {"id": job.job_id, "op": job.op, "state": job.state}
    if job.started_at is not None and job.finished_at is not None:
        line["total_ms"] = round((job.finished_at - job.submitted_at) * 1000, 1)
    for name in FIGURES:
        value = getattr(job, name)
        if value:
            line[name] = round(value, 3) if isinstance(value, float) else value
    if job.attempts > 1:
        line["attempts"] = job.attempts
    return line
