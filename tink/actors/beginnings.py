"""Jobs that begin when they are accepted: where nothing of its model is before a batch or a step, and the
training lane has room, both are journaled in one commit, and the job waits for one less.

It is sent like any other job, in its turn; what is known by then is its number.
"""

from __future__ import annotations

from tink.actors.ahead import SENT_AHEAD
from tink.actors.books import Books
from tink.actors.jobs import Jobs
from tink.actors.link import Link
from tink.domain import plans
from tink.domain.events import Entry, JobAccepted, JobStarted, Subject
from tink.domain.lane import Lane
from tink.errors import UserError


class Beginnings:
    """Between the Router, which accepts (`of`), and the actor that runs the jobs (`take`)."""

    def __init__(self, journal: Books, link: Link, jobs: Jobs) -> None:
        self._journal, self._link, self._jobs = journal, link, jobs
        self._lives: dict[str, str] = {}  # of those that have not had their turn

    def of(self, subject: Subject, accepted: JobAccepted, lane: Lane) -> list[Entry]:
        """The event with which it begins, for the commit of its acceptance; none if that is not for now."""
        life, model = self._link.present, self._journal.ledger.models.get((subject.model_id,))
        if life is None or not life.info.trains or model is None or model.state != "live":
            return []
        if lane.running is not None or lane.next_seq != accepted.seq_id:
            return []
        if len(self._lives) >= self._jobs.room:
            return []
        if accepted.op not in SENT_AHEAD or accepted.invalid is not None:
            return []
        if accepted.op == "optim_step":
            try:
                plans.optim_step((accepted.request or "").encode())
            except UserError:
                return []  # its turn will tell
        self._lives[str(subject.job_id)] = life.incarnation
        started = JobStarted(
            attempt=1,
            backend="trainer",
            op_no=model.op_no + 1,
            seq_id=accepted.seq_id,
            directory=None,
            queue_ms=0.0,
        )
        return [(subject, started)]

    def take(self, job_id: str) -> str | None:
        """The life in which the job, whose turn it is, has begun without being sent, if it has."""
        return self._lives.pop(job_id, None)
