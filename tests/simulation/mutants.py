"""Tink with one thing taken out of it: the simulation must notice. Each mutant is a change of one place."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import msgspec
import pytest
import trio
from sqlalchemy import Connection

from tink import manifest
from tink.actors import lanes as lanes_of_models
from tink.actors import router
from tink.actors.megatron import MegatronActor
from tink.actors.replica_adapters import ReplicaAdapters
from tink.actors.router import Router
from tink.actors.snapshots import Snapshots
from tink.backends import completions
from tink.backends.replica import AdapterMissing
from tink.backends.vllm import VllmClient
from tink.domain import adapters, ids, messages, plans, rows, sampling
from tink.domain.events import Entry, SnapshotTaken, Subject
from tink.domain.lane import Lane
from tink.domain.ledger import Ledger
from tink.errors import TinkError
from tink.journal import queries, sqlite
from tink.journal.journal import Journal
from tink.trainer import artifacts, lanes
from tink.trainer.books import Books
from tink.wire import tink_train
from tink.wire.samples import Sampled

Patch = pytest.MonkeyPatch
ALL: dict[str, Callable[[Patch], None]] = {}


def mutant(make: Callable[[Patch], None]) -> Callable[[Patch], None]:
    ALL[make.__name__.replace("_", "-")] = make
    return make


@contextmanager
def applied(name: str | None) -> Iterator[None]:
    with Patch.context() as patch:
        if name is not None:
            ALL[name](patch)
        yield


# -- the three that the promise rests on ------------------------------------------------------------


@mutant
def no_op_fence(patch: Patch) -> None:
    """The trainer applies a repeated op_no again."""
    submit = lanes.Lanes.submit

    async def again(self: lanes.Lanes, request: tink_train.OpRequest) -> tink_train.OpReply:
        account = self._books._accounts.get(request.model_id)
        same_life = request.incarnation == self._books.incarnation
        if same_life and account is not None and request.op_no <= account.applied:
            await self._world.run_sync(lanes.apply, self._engine, request)
        return await submit(self, request)

    patch.setattr(lanes.Lanes, "submit", again)


@mutant
def no_dedupe(patch: Patch) -> None:
    """A repeated submission is a new job."""
    patch.setattr(Router, "_is_known", lambda self, job_id: False)


@mutant
def no_fsync(patch: Patch) -> None:
    """A commit returns before it is on the disk."""
    patch.setitem(sqlite._WRITER_PRAGMAS, "synchronous", ("OFF", 0))


# -- answering and committing -----------------------------------------------------------------------


@mutant
def no_fsync_but_at_checkpoints(patch: Patch) -> None:
    """SQLite's own default for a WAL, in many builds."""
    patch.setitem(sqlite._WRITER_PRAGMAS, "synchronous", ("NORMAL", 1))


@mutant
def answer_before_commit(patch: Patch) -> None:
    submit = Router._submit_training

    def early(self: Router, ask: messages.SubmitTraining) -> Any:
        work = submit(self, ask)

        async def later() -> None:
            with suppress(TinkError):
                await work

        async def at_once() -> messages.Promise:
            await trio.lowlevel.checkpoint()
            seq = self._next_number(ask) if ask.seq_id is None else ask.seq_id
            return messages.Promise(ids.job_id(ask.model_id, seq), model_id=ask.model_id)

        self._nursery.start_soon(later)
        return at_once()

    patch.setattr(Router, "_submit_training", early)


@mutant
def body_after_event(patch: Patch) -> None:
    """The event names a body that is stored after it."""
    put = router.Router._accept

    async def accept(self: Router, subject: Subject, accepted: Any, body: bytes, *rest: Any) -> None:
        kept: list[bytes] = []

        async def later(content: bytes) -> str:
            kept.append(content)
            return str(__import__("hashlib").sha256(content).hexdigest())

        bodies = self._journal.bodies
        store = bodies.put
        with Patch.context() as inner:
            inner.setattr(bodies, "put", later)
            await put(self, subject, accepted, body, *rest)
        for content in kept:
            await store(content)

    patch.setattr(Router, "_accept", accept)


@mutant
def split_transaction(patch: Patch) -> None:
    """What belongs together is committed one by one."""
    append = Journal.append

    async def one_by_one(self: Journal, *entries: Entry) -> None:
        for entry in entries:
            await append(self, entry)

    patch.setattr(Journal, "append", one_by_one)


# -- order and numbers ------------------------------------------------------------------------------


@mutant
def lane_order_ignored(patch: Patch) -> None:
    """What is there runs, whatever number is next."""

    def start(self: Lane) -> str | None:
        if self.running is None and self.waiting:
            self.next_seq = min(self.waiting)
            self.running = self.waiting.pop(self.next_seq)
            return self.running
        return None

    patch.setattr(Lane, "start", start)


@mutant
def impatient_lane(patch: Patch) -> None:
    """Numbers that are still to come are skipped."""
    patch.setattr(lanes_of_models, "SEQ_GAP_SECONDS", 0.05)


@mutant
def number_after_sending(patch: Patch) -> None:
    """An operation is sent while its number is being journaled."""
    begin = MegatronActor._begin_attempt

    async def in_the_background(self: MegatronActor, job: rows.Job, *rest: Any) -> None:
        async def later() -> None:
            await trio.sleep(0.03)
            await begin(self, job, *rest)

        # The nursery of the journal: of all that is at hand it lives longest.
        trio.lowlevel.spawn_system_task(later)
        await trio.lowlevel.checkpoint()

    patch.setattr(MegatronActor, "_begin_attempt", in_the_background)


@mutant
def new_number_after_restart(patch: Patch) -> None:
    """The next worker sends a running job under a number of its own."""
    outcome = MegatronActor._outcome

    async def renumbered(self: MegatronActor, job: rows.Job, begun_in: str | None) -> Any:
        job.op_no = None
        return await outcome(self, job, begun_in)

    patch.setattr(MegatronActor, "_outcome", renumbered)


# -- redo and snapshots -----------------------------------------------------------------------------


@mutant
def redo_without_failed_jobs(patch: Patch) -> None:
    """A redo leaves out the numbers of operations that failed."""
    ops = queries.ops

    def done_ones(connection: Connection, *rest: Any, **range_: Any) -> list[rows.Job]:
        return [job for job in ops(connection, *rest, **range_) if job.state != "failed"]

    patch.setattr(queries, "ops", done_ones)


@mutant
def redo_of_failed_jobs(patch: Patch) -> None:
    """A redo applies what had failed."""
    again = plans.again

    def tried(job: rows.Job, body: bytes, ledger: Ledger) -> tink_train.Op:
        if job.op == "forward_backward" and job.state == "failed":
            return tink_train.ForwardBackward(b"what failed")
        return again(job, body, ledger)

    patch.setattr(plans, "again", tried)


@mutant
def lost_gradients(patch: Patch) -> None:
    """A redo forgets what was accumulated since the last step."""
    ops = queries.ops

    def steps(connection: Connection, *rest: Any, **range_: Any) -> list[rows.Job]:
        jobs = ops(connection, *rest, **range_)
        last = max((job.op_no or 0 for job in jobs if job.op == "optim_step"), default=0)
        for job in jobs:
            if job.op == "forward_backward" and (job.op_no or 0) > last:
                job.state = "failed"
        return jobs

    patch.setattr(queries, "ops", steps)


@mutant
def snapshot_named_before_published(patch: Patch) -> None:
    take = Snapshots._take

    async def name_first(self: Snapshots, life: Any, job: rows.Job) -> None:
        model_id, op_no = str(job.model_id), int(job.op_no or 0)
        directory = ids.directory(model_id, op_no, "snapshot")
        taken = SnapshotTaken(
            snapshot_id=f"{model_id}#{op_no}", op_no=op_no, directory=directory, size_bytes=0
        )
        await self._journal.append((Subject(tenant=job.tenant, model_id=model_id), taken))
        request = tink_train.SnapshotRequest(life.incarnation, life.lease, model_id, directory)
        await life.client.snapshot(request)

    assert take is not None
    patch.setattr(Snapshots, "_take", name_first)


@mutant
def restore_goes_back(patch: Patch) -> None:
    """A snapshot is put back onto a model that is ahead of it."""
    restoring = Books.restoring

    def anyhow(self: Books, model_id: str, book: Any) -> Any:
        account = self._accounts.get(model_id)
        if account is not None and not account.open:
            account.applied = min(account.applied, book.applied - 1)
        return restoring(self, model_id, book)

    patch.setattr(Books, "restoring", anyhow)


@mutant
def damage_unnoticed(patch: Patch) -> None:
    """What is published is read without a look at its hashes."""

    def trusting(self: artifacts.Artifacts, path: str) -> Any:
        target = self.locate(path)
        return target, manifest.read(target)

    patch.setattr(artifacts.Artifacts, "open", trusting)


# -- sampling ---------------------------------------------------------------------------------------


@mutant
def seed_drawn_when_sent(patch: Patch) -> None:
    request_of = sampling.request_of
    rng = random.Random(0)

    def unfixed(job: rows.Job, *rest: Any) -> tink_train.SampleRequest:
        request = request_of(job, *rest)
        if request.seed == job.seed:
            return msgspec.structs.replace(request, seed=rng.randrange(2**31))
        return request

    patch.setattr(sampling, "request_of", unfixed)


@mutant
def newest_adapter(patch: Patch) -> None:
    """A sampler follows its model's newest version."""
    adapter = Journal.adapter

    async def newest(self: Journal, adapter_id: str) -> rows.Adapter:
        found = await adapter(self, adapter_id)
        versions = self.ledger.adapters.values()
        return max((a for a in versions if a.model_id == found.model_id), key=lambda a: a.version)

    patch.setattr(Journal, "adapter", newest)


# -- vLLM servers -----------------------------------------------------------------------------------


@mutant
def one_name_for_all_versions(patch: Patch) -> None:
    """vLLM has a model's adapter by the model's name."""
    patch.setattr(
        adapters, "served_name", lambda home, adapter: f"{adapters.prefix(home)}{adapter.model_id}"
    )


@mutant
def abort_for_success(patch: Patch) -> None:
    """What vLLM has given up half way is an answer: its status is 200."""
    patch.setattr(completions, "_check_complete", lambda *_: None)


@mutant
def base_model_for_a_missing_adapter(patch: Patch) -> None:
    """A server that does not have a version gives something, at least."""
    sample = VllmClient.sample

    async def anyhow(self: VllmClient, request: Any, *, model: str, max_context: int) -> Sampled:
        try:
            return await sample(self, request, model=model, max_context=max_context)
        except AdapterMissing:
            return await sample(self, request, model="base", max_context=max_context)

    patch.setattr(VllmClient, "sample", anyhow)


@mutant
def eviction_of_what_is_in_use(patch: Patch) -> None:
    """The adapter that was asked for longest ago goes, whoever reads it."""

    @asynccontextmanager
    async def using(self: ReplicaAdapters, adapter: rows.Adapter) -> AsyncIterator[str]:
        await self.load(adapter)
        yield self._name(adapter)

    patch.setattr(ReplicaAdapters, "using", using)
