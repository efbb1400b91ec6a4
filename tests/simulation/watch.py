"""What must hold, looked at after every step of a simulation. The first violation ends it.

docs/simulation.md has the table: each invariant, after which steps it is looked at, and by what here.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec

import msgspec
import trio

from tests.simulation.mirror import Mirror, Violation, require
from tests.simulation.power import Storage
from tink.backends.vllm import PROBE
from tink.domain import events, messages, requests, rows
from tink.domain.events import Record
from tink.domain.ledger import Ledger
from tink.domain.projection import Key
from tink.domain.requests import MUTATING
from tink.domain.retention import ENDED
from tink.errors import TinkError
from tink.home import Home
from tink.journal.journal import Journal
from tink.trainer.artifacts import Artifacts
from tink.wire import tink_train

P = ParamSpec("P")

# The tables of which a worker has all that has not ended.
PRESENT = {"sessions", "models", "samplers", "jobs", "checkpoints", "adapters", "snapshots"}


def _looks(check: Callable[Concatenate[Watch, P], None]) -> Callable[Concatenate[Watch, P], None]:
    """Keeps a violation for the end of the simulation: here it would be taken for a bug of the caller."""

    @wraps(check)
    def look(self: Watch, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            check(self, *args, **kwargs)
        except Violation as violation:
            self.found = self.found or violation
            self.broken.set()

    return look


def _again(op: tink_train.Op) -> tink_train.Op:
    """Without what a redo leaves out: an adapter version that is there already."""
    return msgspec.structs.replace(op, export=None) if isinstance(op, tink_train.CreateModel) else op


class Applied(NamedTuple):
    """What an operation was, and the state of its model after it."""

    job_id: str
    op: tink_train.Op
    state: object
    failed: bool


class Watch:
    """`found`: the first violation. `damaged`: directories that a fault has spoiled or deleted. `at`: how
    far the present trainer has come with the models that it has."""

    def __init__(self, home: Home, artifacts: Path, counts: Counter[str]) -> None:
        self.journal, self.bodies = Storage(home.journal), Storage(home.bodies)
        self.found: Violation | None = None
        self.broken = trio.Event()
        self.damaged: set[str] = set()
        self._counts = counts
        self._artifacts = Artifacts(artifacts, "watch")
        self._mirror = Mirror()
        self._durable = 0
        self._least = 0
        self._worker: Journal | None = None
        self._touched: list[tuple[str, Key]] = []
        self._promises: dict[str, messages.Promise] = {}
        self._by_key: dict[tuple[str, str], str] = {}
        self._outcomes: dict[str, messages.Outcome] = {}
        self._applied: dict[tuple[str, int], Applied] = {}
        self.at: dict[str, int] = {}
        self._seeds: dict[str, int | None] = {}
        self._samples: dict[str, tink_train.SampleRequest] = {}

    # -- the worker's databases ---------------------------------------------------------------------

    @_looks
    def opened(self, worker: Journal) -> None:
        """A worker has opened them."""
        self._worker, self._touched = worker, []
        for storage, connection in (
            (self.journal, worker._connection),
            (self.bodies, worker.bodies._writer.connection),
        ):
            storage.attach(connection.connection.driver_connection)  # type: ignore[arg-type]
        self._mirror.begin_again(self.journal.reader, self._least)
        self._look_at_sync()
        self._check_wholes(self._mirror.records)
        self._check_published(self._mirror.records, all_of_it=True)
        self._check_kept()

    def closed(self) -> None:
        """The worker is gone."""
        self._worker, self._least = None, len(self._mirror.records)
        for storage in (self.journal, self.bodies):
            storage.detach()

    def power_was_cut(self) -> None:
        """What was not on the disk is gone, or not."""
        self._least = self._durable

    def backup_was_put_back(self) -> None:
        """An older journal, in place of what there was: what is not in it never was."""
        self._mirror, self._durable, self._least = Mirror(), 0, 0
        told: list[dict[Any, Any]] = [self._promises, self._by_key, self._outcomes]
        for known in (*told, self._applied, self._seeds, self._samples):
            known.clear()

    @_looks
    def looked(self) -> None:
        """Something was done that may have been a commit."""
        if self._worker is None:
            return
        self.bodies.committed()
        if self.journal.committed():
            self._check_memory()
            new, self._touched = self._mirror.follow(self.journal.reader)
            self._look_at_sync()
            self._check_wholes(new)
            self._check_published(new)
            self._check_bodies(new)

    def _look_at_sync(self) -> None:
        if self.journal.synced:
            self._durable = len(self._mirror.records)

    def _check_memory(self) -> None:
        """What the worker holds of the rows that the commit before this one has changed: by now it has
        taken them in. It forgets what has ended, and need not have what is older than itself."""
        assert self._worker is not None
        for table, key in self._touched:
            ours, theirs = (ledger.tables[table].get(key) for ledger in (self.ledger, self._worker.ledger))
            assert ours is not None, "what was touched is there"
            if theirs is not None or (
                table in PRESENT and not ours.ended and not self._may_be_forgotten(ours)
            ):
                require(
                    not ours.ended and ours == theirs, f"J6: {ours} in the journal is {theirs} in memory"
                )

    def _may_be_forgotten(self, row: rows.Row) -> bool:
        match row:
            case rows.Session():
                return row.state == "finished"
            case rows.Model():
                return row.state in ENDED
            case rows.Sampler(adapter_id=None):
                return self.ledger.sessions[(row.session_id,)].state == "finished"
            case rows.Sampler():
                return self.ledger.adapters[(row.adapter_id,)].ended
        return False

    def _check_wholes(self, records: list[Record]) -> None:
        """The events of one job's end are there together."""
        tables = self.ledger.tables
        for record in records:
            job = tables["jobs"].get((record.subject.job_id,))
            if not isinstance(record.event, events.JobDone) or not isinstance(job, rows.Job):
                continue
            if job.seq_id == 0 and job.model_id is not None:
                model = tables["models"][(job.model_id,)]
                live = isinstance(model, rows.Model) and model.state in ("live", "removed")
                require(live, f"J5: {job.job_id} is done, and its model is {model}")
            if job.op in ("save_weights", "save_weights_external"):
                require((job.job_id,) in tables["checkpoints"], f"J5: {job.job_id} has saved nothing")
            if job.op == "save_weights_for_sampler":
                made = [a for a in tables["adapters"].values() if getattr(a, "job_id", None) == job.job_id]
                require(len(made) == 1, f"J5: {job.job_id} has made {made}")

    def _check_bodies(self, records: list[Record]) -> None:
        for record in records:
            event, who = record.event, f"event {record.seq}"
            if isinstance(event, events.JobDone) and event.result_sha256 is not None:
                self._body(event.result_sha256, who)
            if isinstance(event, events.JobAccepted) and event.body_sha256 is not None:
                body = self._body(event.body_sha256, who)
                if event.op == "sample":
                    named = msgspec.json.decode(body, type=requests.Sample).sampling_params.seed
                    self._seeds[str(record.subject.job_id)] = event.seed if named is None else named

    def _check_kept(self) -> None:
        """The bodies that are still needed: of open jobs, and of those that a redo applies again."""
        ledger = self.ledger
        taken: defaultdict[str, list[int]] = defaultdict(list)
        for snapshot in self.ledger.snapshots.values():
            if snapshot.state == "live":
                taken[snapshot.model_id].append(snapshot.op_no)
        models = ledger.models
        for job in ledger.jobs.values():
            if job.model_id is not None and models[(job.model_id,)].state == "removed":
                continue
            # A damaged newest snapshot falls back to the one before it.
            start = min(taken[str(job.model_id)], default=0) if len(taken[str(job.model_id)]) > 1 else 0
            redone = job.state == "done" and job.op in MUTATING and (job.op_no or 0) > start
            # With a single one it is not known how much had been given up for it.
            redone = redone and len(taken[str(job.model_id)]) != 1
            if job.body_sha256 is not None and (redone or job.state in rows.OPEN):
                self._body(job.body_sha256, job.job_id)

    def _body(self, digest: str, who: str) -> bytes:
        for storage, table in ((self.journal, "short_bodies"), (self.bodies, "bodies")):
            query = f"SELECT content FROM {table} WHERE sha256 = ?"
            found = storage.reader.execute(query, (digest,)).fetchone()
            if found is None:
                continue
            content: bytes = found[0]
            require(
                hashlib.sha256(content).hexdigest() == digest, f"J1: {who} needs a body that is damaged"
            )
            require(storage.synced, f"J1: {who} needs a body that is not on the disk")
            return content
        raise Violation(f"J1: {who} needs a body that is not there")

    # -- what is published --------------------------------------------------------------------------

    def _check_published(self, records: list[Record], *, all_of_it: bool = False) -> None:
        """`all_of_it`: not only what has just been named, but what still must be there."""
        tables = self.ledger.tables
        for record in records:
            event, job_id = record.event, record.subject.job_id
            match event:
                case events.SnapshotDropped(reason="damaged"):
                    self._counts["fallbacks"] += not all_of_it
                    continue
                case events.SnapshotTaken():
                    row: Any = tables["snapshots"][(event.snapshot_id,)]
                    needed = row.state == "live" and row.directory not in self.damaged
                case events.CheckpointSaved():
                    row = tables["checkpoints"][(job_id,)]
                    needed = row.state == "live"
                case events.AdapterExported():
                    row = tables["adapters"][(record.subject.adapter_id,)]
                    needed = row.state == "live"
                case _:
                    continue
            if needed or not all_of_it:
                try:
                    self._artifacts.open(row.directory)
                except TinkError as error:
                    raise Violation(f"L1: event {record.seq} names {row.directory}: {error}") from error

    # -- the trainer --------------------------------------------------------------------------------

    def trainer_started(self) -> None:
        self.at.clear()

    @property
    def ledger(self) -> Ledger:
        """What the journal has."""
        return self._mirror.ledger

    def placements(self) -> list[rows.AdapterPlacement]:
        """As the journal's table has them."""
        query = "SELECT adapter_id, replica, state, changed_at FROM adapter_placements"
        found = self.journal.reader.execute(query).fetchall()
        return [
            rows.AdapterPlacement(adapter_id=adapter_id, replica=replica, state=state, changed_at=at)
            for adapter_id, replica, state, at in found
        ]

    def has_ended(self, job_id: str) -> bool:
        return job_id in self._mirror.ended

    def is_ahead(self, job_id: str) -> bool:
        """Whether one of its model's runs that began before it."""
        return self._mirror.is_ahead(job_id)

    @_looks
    def applied(self, request: tink_train.OpRequest, state: object, *, failed: bool) -> None:
        """The engine has done an operation, or refused to."""
        model_id, op_no = request.model_id, request.op_no
        job = self.ledger.jobs.get((request.job_id,))
        require(job is not None, f"X7: {request.job_id} runs, and is not journaled")
        assert job is not None
        require(job.op_no == op_no, f"X7: {job.job_id} runs as op {op_no}, and is journaled as {job.op_no}")
        if isinstance(request.op, tink_train.Forward | tink_train.ForwardBackward):
            digest = hashlib.sha256(request.op.body).hexdigest()
            require(
                digest == job.body_sha256, f"X7: {job.job_id} runs with another body: {request.op.body!r}"
            )
        before = self.at.get(model_id, 0)
        # Nobody needs what a removal leaves out.
        is_next = op_no > before if isinstance(request.op, tink_train.RemoveModel) else op_no == before + 1
        require(is_next, f"X1: op {op_no} of {model_id} is applied after op {before}")
        self.at[model_id] = op_no
        now = Applied(job.job_id, request.op, state, failed)
        known = self._applied.setdefault((model_id, op_no), now)
        if known is now:
            return
        self._counts["operations redone"] += 1
        if isinstance(request.op, tink_train.Skip):
            if job.state == "failed" and not known.failed:
                # Its attempts were used up: it counts for nothing, and so does what was ahead of it.
                self._applied[model_id, op_no] = now
                behind = self._applied.get((model_id, op_no + 1))
                if behind is not None and not self.has_ended(behind.job_id):
                    del self._applied[model_id, op_no + 1]
                return
            require(known.failed or job.op not in MUTATING, f"X6: {job.job_id} is left out of a redo")
        else:
            require(_again(known.op) == _again(request.op), f"X6: {job.job_id} is redone as {request.op}")
            if failed and getattr(request.op, "source", None) in self.damaged:
                return
        require(known.state == state, f"X6: after the redo of op {op_no}, {model_id} is {state}")

    @_looks
    def restored(self, model_id: str, op_no: int, state: object) -> None:
        self._counts["snapshots restored"] += 1
        before = self.at.get(model_id, 0)
        require(op_no > before, f"X6: {model_id} is at op {before} and set back to {op_no}")
        known = self._applied.get((model_id, op_no))  # none from before the simulation
        right = known is None or known.state == state
        require(right, f"X6: the snapshot of op {op_no} of {model_id} is {state}, not {known}")
        self.at[model_id] = op_no

    @_looks
    def sampled(self, request: tink_train.SampleRequest) -> None:
        ledger = self.ledger
        job = ledger.jobs.get((request.sample_id,))
        require(job is not None, f"X7: {request.sample_id} runs, and is not journaled")
        assert job is not None
        sampler = ledger.samplers[(str(job.sampler_id),)]
        adapter = ledger.adapters.get((sampler.adapter_id,))
        directory = None if adapter is None else adapter.directory
        require(request.adapter == directory, f"L2: {job.job_id} reads {request.adapter}, not {directory}")
        seed = self._seeds[job.job_id]
        require(request.seed == seed, f"X7: {job.job_id} is sampled with {request.seed}, not {seed}")
        require(
            self._samples.setdefault(job.job_id, request) == request,
            f"X7: {job.job_id} is sent as {request}, and was sent as {self._samples[job.job_id]}",
        )

    # -- vLLM servers -------------------------------------------------------------------------------

    @_looks
    def computes(self, path: str | None, body: dict[str, Any]) -> None:
        """One begins a completion, by the adapter that it has loaded from there."""
        if body["prompt"] == PROBE and body["max_tokens"] == 1:
            return
        directory = None if path is None else Path(path).relative_to(self._artifacts.root).as_posix()
        samplers = self.ledger.samplers
        adapters = self.ledger.adapters
        for job in self.ledger.jobs.values():
            if job.op != "sample" or job.state != "running" or self._seeds[job.job_id] != body["seed"]:
                continue
            adapter = adapters.get((samplers[(str(job.sampler_id),)].adapter_id,))
            if directory == (None if adapter is None else adapter.directory):
                return
        raise Violation(f"L2: nobody asked for seed {body['seed']} of {directory}")

    @_looks
    def unloads(self, name: str, *, used: bool) -> None:
        require(not used, f"L6: {name} is unloaded while it is sampled from")

    @_looks
    def dies(self, path: str) -> None:
        """An adapter that it was to read again is not there."""
        raise Violation(f"L6: {path} was deleted while a server had it")

    # -- answers to clients -------------------------------------------------------------------------

    @_looks
    def answered(self, question: messages.Question, answer: Any) -> None:
        match question:
            case messages.SubmitTraining() | messages.SubmitSample():
                self._check_promise(question, answer)
            case messages.AwaitOutcome():
                self._check_outcome(question.job_id, answer)
            case messages.CreateSession():
                self._check_durable(self._mirror.made.get(("sessions", (answer.id,))), answer.id)
            case messages.CreateSampler():
                self._check_durable(self._mirror.made.get(("samplers", (answer.id,))), answer.id)

    def _check_durable(self, seq: int | None, what: str) -> None:
        require(seq is not None, f"J1: {what} is acknowledged, and is not in the journal")
        assert seq is not None
        require(seq <= self._durable, f"J2: {what} is acknowledged, and only later on the disk")

    def _check_promise(
        self, question: messages.SubmitTraining | messages.SubmitSample, promise: messages.Promise
    ) -> None:
        job_id = promise.request_id
        owner = question.model_id if isinstance(question, messages.SubmitTraining) else question.sampler_id
        if question.key is not None:
            place = owner if isinstance(question, messages.SubmitTraining) else question.tenant
            first = self._by_key.setdefault((place, question.key), job_id)
            require(first == job_id, f"X4: {question.key} of {place} is {job_id}, and was {first}")
        elif question.seq_id is not None:
            is_right = job_id == f"{owner}:{question.seq_id}"
            require(is_right, f"X4: {owner} gets the promise {job_id}")
        known = self._promises.setdefault(job_id, promise)
        require(known == promise, f"X4: {job_id} is promised as {promise}, and was as {known}")
        self._check_durable(self._mirror.made.get(("jobs", (job_id,))), job_id)
        job = self.ledger.jobs[(job_id,)]
        if job.body_sha256 is not None and job.state in rows.OPEN:
            self._body(job.body_sha256, job_id)

    def _check_outcome(self, job_id: str, outcome: messages.Outcome) -> None:
        known = self._outcomes.setdefault(job_id, outcome)
        require(known == outcome, f"X4: {job_id} ends as {outcome}, and had as {known}")
        self._check_durable(self._mirror.ended.get(job_id), f"the end of {job_id}")
        job = self.ledger.jobs[(job_id,)]
        told = (outcome.state, outcome.result, outcome.error)
        require(told == (job.state, job.result, job.error), f"J6: {job_id} is answered with {outcome}")
        if job.result_sha256 is not None:
            content = b"" if outcome.body is None else outcome.body
            right = hashlib.sha256(content).hexdigest() == job.result_sha256
            require(right, f"J1: {job_id} is answered with another body than the journaled one")

    # -- the end ------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Raises what was found."""
        if self.found is not None:
            raise self.found
