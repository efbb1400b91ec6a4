"""The Router: takes every question of the HTTP side, accepts jobs, keeps each model's order, and wakes
those who wait for a result.

Its loop never waits: a question is decided at once, from the ledger, and what must be durable or read
first is finished by a task of its own, which decides again without a pause once it has what it waited for.
So no two questions are half decided at the same time, and their commits still group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import trio

from tink import crash
from tink.actors.beginnings import Beginnings
from tink.actors.books import JobBooks
from tink.actors.catalogue import Catalogue
from tink.actors.jobs import Jobs
from tink.actors.lanes import Lanes
from tink.actors.outcomes import Outcomes
from tink.actors.reply import Reply
from tink.domain import ids, keys, memory, messages, rows
from tink.domain.events import JobAccepted, JobCancelled, JobFailed, Subject
from tink.domain.lane import Lane
from tink.domain.memory import RowId
from tink.domain.requests import DATA_OPS
from tink.errors import NotFound, Overloaded, TooLarge, UserError
from tink.limits import MAILBOX, MAX_COMMAND_BODY, MAX_OPEN_JOBS, MAX_SEQ, SEQ_GAP_SECONDS
from tink.world import World

Submit = messages.SubmitTraining | messages.SubmitSample

SKIPPED = "this sequence number was skipped: it had not come {seconds:.0f} s after later ones; submit again"


class _Question(msgspec.Struct, frozen=True):
    ask: messages.Question
    reply: Reply[Any] = msgspec.field(default_factory=Reply)


class _Settled(msgspec.Struct, frozen=True):
    """A running actor's word that a job's terminal event is durable."""

    job_id: str


class _Released(msgspec.Struct, frozen=True):
    """The model of that job, which has ended, is free for its next one."""

    job_id: str


class _Restarted(msgspec.Struct, frozen=True):
    """The actor that runs these jobs begins (again)."""

    jobs: Jobs
    reply: Reply[None] = msgspec.field(default_factory=Reply)


_Message = _Question | _Settled | _Released | _Restarted


class Router:
    """`ask` is for the HTTP side, `settle` for the actors, which run the jobs in `training` and `sampling`;
    `run` is its task."""

    def __init__(
        self,
        journal: JobBooks,
        catalogue: Catalogue,
        training: Jobs,
        sampling: Jobs,
        beginnings: Beginnings,
        world: World,
    ) -> None:
        self._journal, self.catalogue, self._world = journal, catalogue, world
        self._beginnings = beginnings
        self._training, self._sampling = training, sampling
        self._outcomes = Outcomes(journal)
        self._mailbox, self._sent = trio.open_memory_channel[_Message](MAILBOX)
        self._accepting: dict[str, trio.Event] = {}
        self.lanes = Lanes(journal, training, self._accepting)
        self._cancelling: set[str] = set()
        self._by_key: dict[tuple[str, str], trio.Event] = {}  # until a submission with a key is decided

    async def ask(self, question: messages.Question) -> Any:
        """The answer that the message names. Raises TinkError. Cancelled: a job that was being accepted
        is accepted all the same, and a repeat will find it."""
        envelope = _Question(question)
        await self._mailbox.send(envelope)
        return await envelope.reply.wait()

    async def settle(self, job_id: str) -> None:
        await self._mailbox.send(_Settled(job_id))

    async def release(self, job_id: str) -> None:
        await self._mailbox.send(_Released(job_id))

    async def restarted(self, jobs: Jobs) -> None:
        """The actor that runs these jobs begins: those that wait there are forgotten, and all that are open
        are sent there, in one step. Returns when that is done."""
        message = _Restarted(jobs)
        await self._mailbox.send(message)
        await message.reply.wait()

    def release_waiters(self) -> None:
        """The worker is stopping: whoever waits for a result is told to ask again, of the next one."""
        self._outcomes.release()

    async def run(self) -> None:
        """Takes the lanes from the journal, then serves for ever."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for job in self.lanes.load():
                nursery.start_soon(self._came_too_late, rows.about(job))
            nursery.start_soon(self.lanes.run)
            async for message in self._sent:
                match message:
                    case _Settled():
                        self._ended(message.job_id)
                    case _Released():
                        self.lanes.release(message.job_id)
                    case _Restarted():
                        message.jobs.clear()
                        self._send_open_jobs(message.jobs)
                        message.reply.set(None)
                    case _Question():
                        self._decide(message)

    def _send_open_jobs(self, jobs: Jobs) -> None:
        if jobs is self._training:
            self.lanes.resume()
            return
        for job in self._journal.ledger.jobs.values():
            if job.sampler_id is not None and job.job_id not in self._cancelling:
                jobs.send(job.job_id)

    # -- questions ----------------------------------------------------------------------------------

    def _decide(self, question: _Question) -> None:
        about = memory.named(question.ask)
        if any(not self._is_being_made(row_id) for row_id in self._journal.present.lacking(about)):
            self._nursery.start_soon(self._recall, question, about)
            return
        try:
            work = self._work_for(question.ask, question.reply)
        except Exception as error:
            # A bug in one answer is that caller's 500, and nobody else's; the caller logs it.
            question.reply.fail(error)
        else:
            if work is not None:
                self._journal.present.hold(about)
                self._nursery.start_soon(self._finish, work, question.reply, about)

    def _is_being_made(self, row_id: RowId) -> bool:
        table, id_ = row_id
        return table == "models" and ids.job_id(id_, 0) in self._accepting

    async def _recall(self, question: _Question, about: Collection[RowId]) -> None:
        """Reads what it is about, which may have been forgotten, and decides then."""
        try:
            async with self._journal.recalled(about):
                work = self._work_for(question.ask, question.reply)
                assert work is not None, "it is about no job alone"
                question.reply.set(await work)
        except Exception as error:
            question.reply.fail(error)

    def _work_for(self, ask: messages.Question, reply: Reply[Any]) -> Awaitable[Any] | None:
        """What is left to do for the answer; None if the reply is kept until a job ends."""
        match ask:
            case messages.SubmitTraining():
                return self._submit_training(ask)
            case messages.SubmitSample():
                return self._submit_sample(ask)
            case messages.AwaitOutcome():
                return self._await_outcome(ask, reply)
            case messages.CancelJob():
                return self._cancel(ask)
        return self.catalogue.answer(ask)

    async def _finish(self, work: Awaitable[Any], reply: Reply[Any], about: Collection[RowId]) -> None:
        try:
            reply.set(await work)
        except Exception as error:
            reply.fail(error)
        finally:
            self._journal.present.release(about)

    # -- submitting ---------------------------------------------------------------------------------

    def _submit_training(self, ask: messages.SubmitTraining) -> Awaitable[messages.Promise]:
        self.catalogue.session(ask.tenant, ask.session_id)
        if ask.key is not None:
            return self._submit_once(ask, ask.key)
        if ask.seq_id is not None:
            return self._submit_as(ask, ask.seq_id)
        # A number of the Router's always has a key: by that it is told from one that its client counts.
        return self._submit_as(ask, self._next_number(ask), self._world.new_id())

    async def _submit_once(self, ask: Submit, key: str) -> messages.Promise:
        """The first job of that key, or this one as the first."""
        owner = ask.model_id if isinstance(ask, messages.SubmitTraining) else ask.tenant
        place = owner, key
        while place in self._by_key:
            await self._by_key[place].wait()
        self._by_key[place] = trio.Event()
        try:
            known = await self._of_key(ask, key)
            while known is not None and (known.op, known.state) == ("unload_model", "failed"):
                # It changed nothing, and whoever asks again means another try.
                key = keys.again(str(ask.key), known.seq_id)
                known = await self._of_key(ask, key)
            if known is not None:
                await self._check_same(known, ask)
                return _promise(known)
            if isinstance(ask, messages.SubmitSample):
                return await self._submit_sample_as(ask, ids.number(key), key)
            seq = ask.seq_id if ask.seq_id is not None else self._next_number(ask)
            return await self._submit_as(ask, seq, key)
        finally:
            self._by_key.pop(place).set()

    async def _of_key(self, ask: Submit, key: str) -> rows.Job | None:
        if isinstance(ask, messages.SubmitSample):
            return await self._journal.sample_of_key(ask.tenant, key)
        return await self._journal.job_of_key(ask.model_id, key)

    async def _check_same(self, known: rows.Job, ask: Submit) -> None:
        accepted = await self._journal.acceptance(known)
        if accepted.request is not None:
            same = accepted.request.encode() == ask.body
        else:
            digest = await self._world.run_sync(hashlib.sha256, ask.body)
            same = accepted.body_sha256 == digest.hexdigest()
        op = ask.op if isinstance(ask, messages.SubmitTraining) else "sample"
        if not same or accepted.op != op:
            raise UserError(
                f"this key was used for another request, the {known.op} {known.job_id}: "
                "use a new key for each request, and an old one to repeat it as it was"
            )

    def _next_number(self, ask: messages.SubmitTraining) -> int:
        """The one behind all that have come. Raises UserError if there is none, or no such model."""
        self._making(ask)
        seq = self.lanes.of(ask.model_id).end()
        if seq > MAX_SEQ:
            raise UserError(f"{ask.model_id} has no numbers left, for its client counted to {seq - 1}")
        return seq

    def _submit_as(
        self, ask: messages.SubmitTraining, seq: int, key: str | None = None
    ) -> Awaitable[messages.Promise]:
        job_id = ids.job_id(ask.model_id, seq)
        promise = messages.Promise(job_id, model_id=ask.model_id)
        if self._is_known(job_id):
            return self._when_accepted(promise, key)
        making = self._making(ask)
        self.catalogue.routes.check_training()
        invalid = ask.invalid
        if ask.op not in DATA_OPS and len(ask.body) > MAX_COMMAND_BODY:
            invalid = f"the body of {ask.op} is over the limit of {MAX_COMMAND_BODY} bytes"
            if key is not None:  # no number of a client's has to be consumed
                raise TooLarge(invalid)
        inline = ask.op not in DATA_OPS and invalid is None
        accepted = JobAccepted(
            op=ask.op,
            seq_id=seq,
            model_seq_id=ask.model_seq_id,
            request=ask.body.decode() if inline else None,
            body_bytes=len(ask.body),
            codec=ask.codec,
            invalid=invalid,
            key=key,
        )
        subject = Subject(
            tenant=ask.tenant, session_id=ask.session_id, model_id=ask.model_id, job_id=job_id
        )
        lane = self.lanes.of(ask.model_id)
        # What a lane waits for is let in whatever else is open: without it the rest cannot end.
        self._reserve(job_id, awaited=seq == lane.next_seq)
        lane.expect(seq)
        return self._accept_training(subject, accepted, ask.body, promise, making)

    def _making(self, ask: messages.SubmitTraining) -> trio.Event | None:
        """Set once the model is there, if it is being made. NotFound for one that is not."""
        if ask.model_seq_id is not None:
            return None
        making = self._accepting.get(ids.job_id(ask.model_id, 0))
        if making is None:
            self.catalogue.model(ask.tenant, ask.model_id)
        return making

    async def _accept_training(
        self,
        subject: Subject,
        accepted: JobAccepted,
        body: bytes,
        promise: messages.Promise,
        making: trio.Event | None,
    ) -> messages.Promise:
        """`making`: the acceptance of the job that makes the model, which must be durable first."""
        model_id, job_id = str(subject.model_id), str(subject.job_id)
        with self._reservation(job_id):
            lane = self.lanes.of(model_id)
            # Its number was consumed, or it has ended and its lane is not released yet.
            repeated = accepted.seq_id < lane.next_seq or lane.running == job_id
            # Or it has made a model that was forgotten, and this lane begins anew.
            makes = accepted.model_seq_id is not None
            if (repeated or makes) and (known := await self._journal.job(job_id)) is not None:
                if not repeated:
                    self.lanes.drop(model_id)
                _check_own(known, accepted.key)
                return promise
            if making is not None:
                await making.wait()
                self.catalogue.model(str(subject.tenant), model_id)
            await self._accept(subject, accepted, body, self.lanes.of(model_id))
            in_time = self.lanes.of(model_id).arrive(accepted.seq_id, job_id)
        if in_time:
            self.lanes.advance(model_id)
        else:
            await self._came_too_late(subject)
        return promise

    async def _came_too_late(self, subject: Subject) -> None:
        failed = JobFailed(category="user", error=SKIPPED.format(seconds=SEQ_GAP_SECONDS))
        await self._journal.append((subject, failed))
        self._ended(str(subject.job_id))

    def _submit_sample(self, ask: messages.SubmitSample) -> Awaitable[messages.Promise]:
        self.catalogue.sampler(ask.tenant, ask.sampler_id)
        if ask.key is not None:
            return self._submit_once(ask, ask.key)
        if ask.seq_id is not None:
            return self._submit_sample_as(ask, ask.seq_id)
        key = self._world.new_id()
        return self._submit_sample_as(ask, ids.number(key), key)

    def _submit_sample_as(
        self, ask: messages.SubmitSample, seq: int, key: str | None = None
    ) -> Awaitable[messages.Promise]:
        sampler = self.catalogue.sampler(ask.tenant, ask.sampler_id)
        job_id = ids.job_id(ask.sampler_id, seq)
        promise = messages.Promise(job_id, sample_sequence_ids=ids.sequence_ids(job_id, ask.num_samples))
        if self._is_known(job_id):
            return self._when_accepted(promise, key)
        self.catalogue.routes.check_sampling()
        accepted = JobAccepted(
            op="sample",
            seq_id=seq,
            sampler_id=ask.sampler_id,
            body_bytes=len(ask.body),
            seed=ask.seed if ask.seed is not None else self._world.new_seed(),
            num_samples=ask.num_samples,
            key=key,
        )
        subject = Subject(
            tenant=ask.tenant, session_id=sampler.session_id, job_id=job_id, adapter_id=sampler.adapter_id
        )
        self._reserve(job_id)
        return self._accept_sample(subject, accepted, ask.body, promise)

    async def _accept_sample(
        self, subject: Subject, accepted: JobAccepted, body: bytes, promise: messages.Promise
    ) -> messages.Promise:
        job_id = promise.request_id
        with self._reservation(job_id):
            if (known := await self._journal.job(job_id)) is not None:
                _check_own(known, accepted.key)
                return promise
            await self._accept(subject, accepted, body)
        self._sampling.send(job_id)
        return promise

    async def _accept(
        self, subject: Subject, accepted: JobAccepted, body: bytes, lane: Lane | None = None
    ) -> None:
        """Body first, then the event: when it returns, the client may be told. `lane`: that of a job of
        a model, which may begin at once."""
        if accepted.request is None and accepted.invalid is None:
            digest = await self._journal.bodies.put(body)
            crash.point("worker.body")
            accepted = msgspec.structs.replace(accepted, body_sha256=digest)
        begins = [] if lane is None else self._beginnings.of(subject, accepted, lane)
        await self._journal.append((subject, accepted), *begins)
        crash.point("worker.accepted")
        if begins:
            crash.point("worker.started")

    def _is_known(self, job_id: str) -> bool:
        return job_id in self._accepting or (job_id,) in self._journal.ledger.jobs

    async def _when_accepted(self, promise: messages.Promise, key: str | None = None) -> messages.Promise:
        """The first one's promise, once the first one is durable."""
        accepting = self._accepting.get(promise.request_id)
        if accepting is not None:
            await accepting.wait()
        known = await self._journal.job(promise.request_id)
        if known is None:
            raise Overloaded("the first submission of this job failed: send it again")
        _check_own(known, key)
        return promise

    def _reserve(self, job_id: str, *, awaited: bool = False) -> None:
        open_jobs = len(self._journal.ledger.jobs) + len(self._accepting)
        if open_jobs >= MAX_OPEN_JOBS and not awaited:
            raise Overloaded(f"{open_jobs} jobs are open: send it again when some have ended")
        self._accepting[job_id] = trio.Event()

    @contextmanager
    def _reservation(self, job_id: str) -> Iterator[None]:
        """Holds what `_reserve` took; whoever waits for it goes on when it is given up."""
        try:
            yield
        finally:
            self._accepting.pop(job_id).set()

    def _cancel(self, ask: messages.CancelJob) -> Awaitable[None]:
        job = self._journal.ledger.jobs.get((ask.job_id,))
        if job is None or job.tenant != ask.tenant or job.sampler_id is None:
            return self._nothing_to_cancel(ask)
        # Once: until the first one is durable, the job still looks as if it could be withdrawn.
        if ask.job_id in self._cancelling or not self._sampling.withdraw(ask.job_id):
            return self._nothing_to_cancel(ask)
        self._cancelling.add(ask.job_id)
        return self._cancel_sample(job)

    async def _cancel_sample(self, job: rows.Job) -> None:
        await self._journal.append((rows.about(job), JobCancelled()))
        self._cancelling.discard(job.job_id)
        self._ended(job.job_id)

    async def _nothing_to_cancel(self, ask: messages.CancelJob) -> None:
        await self._job(ask.tenant, ask.job_id)

    # -- outcomes -----------------------------------------------------------------------------------

    def _await_outcome(self, ask: messages.AwaitOutcome, reply: Reply[Any]) -> Awaitable[Any] | None:
        job = self._journal.ledger.jobs.get((ask.job_id,))
        if job is None:
            return self._known_outcome(ask)
        if job.tenant != ask.tenant:
            raise NotFound(f"there is no job {ask.job_id}")
        self._outcomes.keep(ask.job_id, reply)
        return None

    async def _known_outcome(self, ask: messages.AwaitOutcome) -> messages.Outcome:
        return await self._outcomes.of(await self._job(ask.tenant, ask.job_id))

    async def _job(self, tenant: str, job_id: str) -> rows.Job:
        job = await self._journal.job(job_id)
        if job is None or job.tenant != tenant:
            raise NotFound(f"there is no job {job_id}")
        return job

    def _ended(self, job_id: str) -> None:
        """A job's terminal event is durable: say so."""
        self._nursery.start_soon(self._outcomes.announce, job_id)


def _promise(job: rows.Job) -> messages.Promise:
    if job.sampler_id is None:
        return messages.Promise(job.job_id, model_id=job.model_id)
    sequences = ids.sequence_ids(job.job_id, job.num_samples or 1)
    return messages.Promise(job.job_id, sample_sequence_ids=sequences)


def _check_own(known: rows.Job, key: str | None) -> None:
    """A number that the Router gave is no client's, though one may count up to it."""
    if known.key != key:
        raise UserError(
            f"the number {known.seq_id} of {known.model_id or known.sampler_id} was given to a job that "
            f"came without one, a {known.op}: count on from {known.seq_id + 1}"
        )
