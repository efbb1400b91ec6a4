"""Goes through a record, event by event: puts the worker of today before each decision, and compares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import msgspec
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tink.domain import messages, rows
from tink.domain.events import (
    AnyEvent,
    IncarnationStarted,
    JobAccepted,
    JobDone,
    JobFailed,
    JobStarted,
    Record,
    SeqSkipped,
    TrainerStarted,
    kind_of,
)
from tink.errors import JournalUnavailable, TinkError
from tink.journal.recording import Recording
from tink.limits import GAP_LOOKS, REPLAY_PAUSE_SECONDS, SEQ_GAP_SECONDS
from tink.replay.decisions.comparison import (
    NOTHING,
    Difference,
    differences,
    is_end,
    same_course,
)
from tink.replay.decisions.history import History, decisions
from tink.replay.decisions.journal import Append, RecordedJournal, place_of
from tink.replay.decisions.questions import question_of
from tink.replay.decisions.servers import Sent
from tink.replay.decisions.treatment import Treatment, treatment
from tink.replay.decisions.worker import open_worker
from tink.replay.decisions.world import RecordedWorld

LOOK_SECONDS = SEQ_GAP_SECONDS / GAP_LOOKS


class Report(msgspec.Struct, frozen=True):
    """`events` are in the record, of which `compared` were made once more; `given` and `left_out`: by their
    kinds. `lost_jobs`: samples whose requests were pruned, and whose events are `skipped`, with those of a
    job behind its first difference that changed its course."""

    events: int
    compared: int
    given: dict[str, int]
    left_out: dict[str, int]
    lost_jobs: int
    skipped: int
    differences: list[Difference]


def replay(recording: Recording, history: History, sent: Sent | None = None) -> Report:
    """Where the worker of today decides otherwise. `history`: of the same recording. `sent`: is told what
    is sent to servers, which no journal holds. StartupError, in a group, for events that cannot follow each
    other."""
    clock = MockClock()
    return trio.run(_Replay(recording, history, sent, clock).run, clock=clock)


class _Replay:
    def __init__(self, recording: Recording, history: History, sent: Sent | None, clock: MockClock) -> None:
        self._recording, self._history, self._sent, self._clock = recording, history, sent, clock
        self._world = RecordedWorld()
        self._journal = RecordedJournal(recording)
        self._served: TrainerStarted | None = None
        # Jobs that went another way than recorded, or cannot be replayed: the record goes on without them.
        self._departed = set(history.lost)
        self._instead = NOTHING
        self._events = self._compared = self._skipped = 0
        self._given: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()
        self._found: list[Difference] = []

    async def run(self) -> Report:
        groups = decisions(self._recording.records())
        more = True
        while more:
            life = open_worker(self._journal, self._history, self._world, self._served, self._sent)
            async with life as worker, trio.open_nursery() as nursery:
                self._worker, self._nursery = worker, nursery
                more = await self._go_on(groups)
                nursery.cancel_scope.cancel()
        return Report(
            events=self._events,
            compared=self._compared,
            given=dict(self._given),
            left_out=dict(self._left_out),
            lost_jobs=len(self._history.lost),
            skipped=self._skipped,
            differences=self._found,
        )

    async def _go_on(self, groups: Iterator[Sequence[Record]]) -> bool:
        """With one worker. True: another one goes on, from what the record has come to."""
        for records in groups:
            first = records[0]
            self._events += len(records)
            await self._pass_time(first.at)
            how = treatment(first.event)
            if first.subject.job_id in self._departed:
                self._skipped += len(records)
                await self._follow(records)
            elif how is Treatment.LEFT_OUT:
                self._left_out[kind_of(first.event)] += len(records)
                self._journal.commit(records)
            elif how is Treatment.GIVEN:
                self._given[kind_of(first.event)] += len(records)
                self._journal.commit(records)
                if isinstance(first.event, TrainerStarted):
                    self._served = first.event
                    self._worker.link.serve(first.event)
                if isinstance(first.event, IncarnationStarted):
                    return True
            elif not await self._compare(records):
                return True
        return False

    async def _pass_time(self, at: float) -> None:
        """As it did then: what waits for a time to pass looks at the clock in between."""
        pause = min(max(0.0, at - self._world.at), REPLAY_PAUSE_SECONDS) if self._world.at else 0.0
        self._world.at = at
        while pause > LOOK_SECONDS:
            self._clock.jump(LOOK_SECONDS)
            pause -= LOOK_SECONDS
            await wait_all_tasks_blocked()
        self._clock.jump(pause)

    async def _follow(self, records: Sequence[Record]) -> None:
        """The record goes on with a job that this worker does not have."""
        self._journal.commit(records)
        subject = records[0].subject
        if is_end(records[0].event) and subject.model_id is not None:
            await wait_all_tasks_blocked()  # the job before it is released first
            await self._worker.router.release(str(subject.job_id))

    async def _compare(self, records: Sequence[Record]) -> bool:
        """False: today things go on in another way from here on."""
        self._instead = NOTHING
        appended = await self._provoke(records)
        entries = () if appended is None else appended.entries
        self._compared += len(records)
        self._found += differences(records, entries, self._instead)
        self._journal.commit(records)
        if same_course(records, entries):
            assert appended is not None
            del self._journal.pending[place_of(*entries[0])]
            appended.commit()
            return True
        job_id = records[0].subject.job_id
        if job_id is not None and not is_end(records[0].event):
            self._departed.add(job_id)
        return False

    # -- what brings a decision about ---------------------------------------------------------------

    async def _provoke(self, records: Sequence[Record]) -> Append | None:
        """What the worker appends where the record has these; None: nothing of it."""
        first = records[0]
        place = place_of(first.subject, first.event)
        await self._take_turns()
        if place not in self._journal.pending:
            match first.event:
                case JobStarted() | JobDone() | JobFailed():
                    await self._provoke_job(records)
                case SeqSkipped():
                    # The clock of the record is a wall clock, which may have been set back.
                    for _ in range(GAP_LOOKS + 2):
                        if place not in self._journal.pending:
                            self._clock.jump(LOOK_SECONDS)
                            await wait_all_tasks_blocked()
                case _ if treatment(first.event) is Treatment.ASKED:
                    self._worker.training.begins = len(records) > 1
                    overtaken = self._history.overtaken.get(str(first.subject.job_id))
                    if overtaken is not None:
                        self._ask(overtaken)
                        await wait_all_tasks_blocked()
                    self._ask(first)
                    await wait_all_tasks_blocked()
        if isinstance(first.event, JobAccepted) and place not in self._journal.pending:
            return self._accepted_otherwise(first.event)
        return self._journal.pending.get(place)

    async def _take_turns(self) -> None:
        """What the record has as begun before its turn has its turn when it is sent, of which no event
        tells."""
        await wait_all_tasks_blocked()
        for job_id in self._worker.training.waiting():
            job = self._journal.ledger.jobs.get((job_id,))
            if job is not None and job.attempts and job_id not in self._departed:
                self._expect(job)
                self._worker.training.begin(job_id)
        await wait_all_tasks_blocked()

    def _accepted_otherwise(self, event: JobAccepted) -> Append | None:
        """The acceptance of the same request under another number, if there is one."""
        for appended in self._journal.pending.values():
            accepted = appended.entries[0][1]
            if isinstance(accepted, JobAccepted) and event.key is not None and accepted.key == event.key:
                return appended
        return None

    def _ask(self, record: Record) -> None:
        event = record.event
        self._world.next_id = str(record.subject.session_id)
        self._world.next_seed = getattr(event, "seed", None) or 0
        body = b""
        if isinstance(event, JobAccepted) and event.op == "sample":
            body = self._recording.body(str(event.body_sha256))
        try:
            question = question_of(record, self._journal.ledger, body)
        except TinkError as error:
            self._instead = f"refused: {error}"
        else:
            if isinstance(question, messages.SubmitSample) and question.seed is not None:
                self._world.next_seed += 1  # drawn, though the client has named one: a difference
            self._nursery.start_soon(self._put, question)

    async def _put(self, question: messages.Question) -> None:
        try:
            await self._worker.router.ask(question)
        except JournalUnavailable:
            pass  # the worker has ended
        except TinkError as error:
            self._instead = f"refused: {error}"
        except Exception as error:
            # A bug of today's is its client's 500, and a difference.
            self._instead = f"internal error: {error!r}"

    async def _provoke_job(self, records: Sequence[Record]) -> None:
        worker, event = self._worker, records[0].event
        job = self._journal.ledger.jobs.get((str(records[0].subject.job_id),))
        if job is None:
            return
        jobs = worker.sampling if job.model_id is None else worker.training
        if not jobs.runs(job.job_id):
            self._expect(job, event)
            if not jobs.begin(job.job_id):
                self._instead = "it waits for others"
                return
            await wait_all_tasks_blocked()
        if not worker.calls.is_out(job.job_id):
            return
        if isinstance(event, JobFailed) and event.category == "user" and self._refuses_itself(job):
            self._instead = "it is sent to a server"
            return
        worker.calls.end(job.job_id, records)
        await wait_all_tasks_blocked()

    def _expect(self, job: rows.Job, event: AnyEvent | None = None) -> None:
        """The trainer's part before a job of a model is sent, if it is that which stopped it."""
        if job.model_id is None:
            return
        stopped = None
        if isinstance(event, JobFailed) and event.category == "server" and not job.attempts:
            stopped = event.error
        op_no = self._journal.ledger.models[(job.model_id,)].op_no
        self._worker.link.expect(job, op_no, stopped)

    def _refuses_itself(self, job: rows.Job) -> bool:
        """Whether a refusal of the job, as it is now, can only be the worker's own: it was never sent. Of
        samples, vLLM's part looks at what its servers can do, too."""
        return not job.attempts and not self._worker.vllm
