"""The backends of a worker that is replayed: they answer what the record says that they answered, when it
does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import msgspec
import trio

from tink.actors.backends import Backends, Base
from tink.actors.books import Books
from tink.actors.link import Life, Link
from tink.actors.snapshots import Snapshots
from tink.backends.trainer import TrainerClient, TrainerGone
from tink.domain import rows
from tink.domain.events import (
    AdapterExported,
    AdapterPlaced,
    CheckpointSaved,
    JobDone,
    JobFailed,
    JobStarted,
    Record,
    TrainerStarted,
)
from tink.errors import BackendError, UserError
from tink.replay.decisions.journal import Passed
from tink.wire import tink_train

# A job, and the request that a server gets for it: JSON, with the names of bodies in their place.
Sent = Callable[[str, bytes], None]


class Calls:
    """The calls that are out, by their jobs, and what the record has of their ends."""

    def __init__(self, sent: Sent | None) -> None:
        self._sent = sent
        self._out: dict[str, trio.Event] = {}
        self.ends: dict[str, Sequence[Record]] = {}

    async def make(
        self, job_id: str, request: tink_train.Op | tink_train.SampleRequest
    ) -> Sequence[Record]:
        if self._sent is not None:
            self._sent(job_id, msgspec.json.encode(request))
        self._out[job_id] = trio.Event()
        try:
            await self._out[job_id].wait()
        finally:
            del self._out[job_id]
        return self.ends[job_id]

    def is_out(self, job_id: str) -> bool:
        return job_id in self._out

    def end(self, job_id: str, records: Sequence[Record]) -> None:
        self.ends[job_id] = records
        self._out[job_id].set()

    async def place(self, adapter: rows.Adapter) -> list[str]:
        """The sampling servers that had a new version when its job was done."""
        await trio.lowlevel.checkpoint()
        placed = (r for r in self.ends[adapter.job_id] if isinstance(r.event, AdapterPlaced))
        return [str(record.subject.replica) for record in placed]


class RecordedTrainer(TrainerClient):
    def __init__(self, calls: Calls) -> None:
        self._calls, self.url = calls, "the record"

    async def op(self, request: tink_train.OpRequest) -> tink_train.OpReply:
        op = request.op
        if isinstance(op, tink_train.Forward | tink_train.ForwardBackward):
            assert isinstance(op.body, Passed), "a batch is not read"
            op = msgspec.structs.replace(op, body=op.body.digest.encode())
        return op_reply(request, await self._calls.make(request.job_id, op))


def op_reply(request: tink_train.OpRequest, records: Sequence[Record]) -> tink_train.OpReply:
    """What a trainer answered to a job that went on so. TrainerGone: it did not."""
    event = records[0].event
    reply = tink_train.OpReply(
        "failed", request.incarnation, request.model_id, request.op_no, request.op_no
    )
    match event:
        case JobStarted():
            raise TrainerGone("the record has another attempt")
        case JobFailed():
            failure = tink_train.Failure(event.category, event.error)
            return msgspec.structs.replace(reply, failure=failure)
        case JobDone():
            made = None
            if isinstance(request.op, tink_train.CreateModel):
                names = tink_train.ModelInfo.__struct_fields__
                made = tink_train.ModelInfo(*(getattr(request.op, name) for name in names))
            result = tink_train.OpResult(
                body=Passed.of(event.result_sha256, event.result_bytes),
                metrics=event.metrics,
                loss=event.loss_sum,
                tokens=event.tokens_in,
                files=_files(records),
                model=made,
                run_ms=event.run_ms,
                idle_ms=event.idle_ms,
            )
            return msgspec.structs.replace(reply, state="done", result=result)
    raise AssertionError(f"no answer of a trainer: {event}")


def _files(records: Sequence[Record]) -> list[tink_train.File]:
    """Of those that were published, one has the size of all: that of each is not in the record."""
    names, size = {"": ""}, 0
    for record in records:
        match record.event:
            case AdapterExported():
                names, size = record.event.files, record.event.size_bytes
            case CheckpointSaved():
                size = record.event.size_bytes
    if not size:
        return []
    first = next(iter(names))
    return [tink_train.File(name, size if name == first else 0, digest) for name, digest in names.items()]


class RecordedLife(Life):
    """`refusal`: why nothing could be done for the job that begins now, before it was sent."""

    refusal: str | None = None

    def require_training(self) -> None:
        if self.refusal is not None:
            raise BackendError(self.refusal)
        super().require_training()


class RecordedLink(Link):
    """Always there, once the record has named a server. After a life that is lost the next one comes at
    once."""

    def __init__(self, calls: Calls, max_rank: int) -> None:
        super().__init__(None)
        self._calls, self._max_rank, self._lives = calls, max_rank, 0
        self._applied: dict[str, int] = {}  # no redo is ever needed

    def serve(self, server: TrainerStarted | None) -> None:
        self._served = server
        if server is None:
            return
        self._lives += 1
        info = tink_train.Info(
            protocol=tink_train.PROTOCOL,
            incarnation=str(self._lives),
            engine=server.engine,
            versions=server.versions,
            base_model=server.base_model,
            base_path=server.base_path,
            base_digest=server.base_digest,
            arch=server.arch,
            parameters=0,
            vocab_size=0,
            max_context=server.max_context,
            max_rank=self._max_rank,
            losses=[],
            capabilities=["train"] if server.trains else [],
        )
        self._life = RecordedLife(RecordedTrainer(self._calls), info, 0, self._applied)
        self._arrived.set()

    def expect(self, job: rows.Job, op_no: int, refusal: str | None) -> None:
        """A job of a model is about to begin, which the server has up to `op_no`."""
        self._applied[str(job.model_id)] = max(op_no, 1)
        if isinstance(self._life, RecordedLife):
            self._life.refusal = refusal

    def is_new(self, life: Life) -> bool:
        return False

    @asynccontextmanager
    async def exposure(self, *, alone: bool) -> AsyncIterator[None]:
        await trio.lowlevel.checkpoint()
        yield

    def lost(self, life: Life) -> None:
        if self._life is life:
            self.serve(self._served)

    def replace(self, life: Life, reason: str) -> None:
        self.lost(life)


class RecordedSamples:
    """A SamplingBackend."""

    slots = 1

    def __init__(self, calls: Calls, journal: Books) -> None:
        self._calls, self._journal = calls, journal

    async def sample(
        self, job: rows.Job, request: tink_train.SampleRequest, adapter: rows.Adapter | None
    ) -> tink_train.SampleReply:
        while True:
            records = await self._calls.make(job.job_id, request)
            match records[0].event:
                case JobStarted(backend=backend):
                    started = JobStarted(attempt=job.attempts + 1, backend=backend)
                    await self._journal.append((rows.about(job), started))
                case JobFailed(category="user", error=error):
                    raise UserError(error)
                case JobFailed(error=error):
                    raise BackendError(error)
                case JobDone() as done:
                    return tink_train.SampleReply(
                        state="done",
                        sample_id=request.sample_id,
                        body=Passed.of(done.result_sha256, done.result_bytes),
                        tokens_in=done.tokens_in,
                        tokens_out=done.tokens_out,
                        run_ms=done.run_ms,
                    )


class RecordedBackends(Backends):
    """`sampled`: the base model where no trainer says which."""

    def __init__(self, link: RecordedLink, sampled: str) -> None:
        super().__init__(link, None)
        self._sampled = sampled

    def known(self) -> Base | None:
        return super().known() or Base(self._sampled, 0)

    async def base(self) -> Base:
        await trio.lowlevel.checkpoint()
        return self.known() or Base(self._sampled, 0)


class RecordedSnapshots(Snapshots):
    """When one is taken is not replayed."""

    async def consider(self, life: Life | None, job: rows.Job, *, between: bool) -> None:
        await trio.lowlevel.checkpoint()

    def is_due(self, job: rows.Job) -> bool:
        """Nothing is held back here: the record says when a job begins."""
        return False
