"""What the journal says happened. Each event is one frozen struct; its tag is the `kind` column and
its fields are the `data` column. They may only grow by defaulted fields at the end, for every journal
ever written is folded by the code of today."""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec

from tink.domain.requests import OpName
from tink.wire.tink_train import Info


class Event(msgspec.Struct, frozen=True, tag_field="kind", kw_only=True):
    pass


# -- the worker -------------------------------------------------------------------------------------


class IncarnationStarted(Event, frozen=True, kw_only=True, tag="incarnation_started"):
    """A worker opened the journal. The first event of each boot."""

    number: int
    boot_id: str
    version: str
    settings_digest: str


class IncarnationStopped(Event, frozen=True, kw_only=True, tag="incarnation_stopped"):
    """The worker stopped by itself; a crash leaves none of these."""

    number: int
    reason: str


class TrainerStarted(Event, frozen=True, kw_only=True, tag="trainer_started"):
    """Another training server than before answered: it holds no state, or that of another life, and
    models are brought up to date in it as they are used. `versions`: of what its results depend on.
    `trains`: false for a server that only samples."""

    incarnation: str
    engine: str
    base_model: str
    base_digest: str
    arch: str = ""
    max_context: int = 0
    base_path: str | None = None
    versions: dict[str, str] = {}
    trains: bool = True

    @classmethod
    def of(cls, info: Info) -> TrainerStarted:
        return cls(**{name: getattr(info, name) for name in cls.__struct_fields__})


# -- sessions ---------------------------------------------------------------------------------------


class SessionCreated(Event, frozen=True, kw_only=True, tag="session_created"):
    tags: list[str] = []
    user_metadata: dict[str, Any] = {}
    sdk_version: str = ""
    project_id: str | None = None
    display_name: str | None = None
    idempotency_key: str | None = None


class SessionFinished(Event, frozen=True, kw_only=True, tag="session_finished"):
    reason: str
    detail: str | None = None


class SessionMoved(Event, frozen=True, kw_only=True, tag="session_moved"):
    project_id: str | None = None


class ClientFailed(Event, frozen=True, kw_only=True, tag="client_failed"):
    """The SDK's telemetry reported an exception on the client's side: its type, never its text."""

    exception_type: str


# -- jobs -------------------------------------------------------------------------------------------


class JobAccepted(Event, frozen=True, kw_only=True, tag="job_accepted"):
    """The job and its body are on stable storage; the client may be told so. `request` is the JSON of
    a command, `body_sha256` names the body of a data op in the body store (`codec` as received).
    `seed` was drawn at acceptance for a sample that named none. `invalid`: the body could not be
    served; the job fails with that when its turn comes, for its number must be consumed. `key`: what a
    repeat of the job is known by if its client gave it no number."""

    op: OpName
    seq_id: int
    model_seq_id: int | None = None
    sampler_id: str | None = None
    request: str | None = None
    body_sha256: str | None = None
    body_bytes: int = 0
    codec: str = "identity"
    seed: int | None = None
    num_samples: int | None = None
    invalid: str | None = None
    key: str | None = None


class JobStarted(Event, frozen=True, kw_only=True, tag="job_started"):
    """About to be sent to a backend. A training job gets its op_no with attempt 1 and keeps it, and
    the `directory` it reads or writes: a redo takes them from here, whatever has happened since.
    `queue_ms`: since the job was accepted."""

    attempt: int
    backend: str
    op_no: int | None = None
    seq_id: int | None = None
    directory: str | None = None
    queue_ms: float | None = None


class JobDone(Event, frozen=True, kw_only=True, tag="job_done"):
    """Final. The answer is `result` (JSON) or the body `result_sha256` (protobuf). `idle_ms`: for how long
    the trainer had nothing to do just before it; None if nobody said. `queue_ms`: the whole wait of a job
    that waited at its server too; None if it did not. `step`: of the model, counted from 1, the optimizer
    step that the job makes or adds a gradient to. `learning_rate`: of an optim_step."""

    result: dict[str, Any] | None = None
    result_sha256: str | None = None
    result_bytes: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    loss_sum: float | None = None
    metrics: dict[str, float] = {}
    run_ms: float = 0.0
    idle_ms: float | None = None
    queue_ms: float | None = None
    step: int | None = None
    learning_rate: float | None = None


class JobFailed(Event, frozen=True, kw_only=True, tag="job_failed"):
    """Final. `seq_id` is consumed by it, unless it was when the job began; and `op_no` if it was sent."""

    category: Literal["user", "server"]
    error: str
    seq_id: int | None = None


class JobCancelled(Event, frozen=True, kw_only=True, tag="job_cancelled"):
    """Final: the client withdrew it before it ran."""


class SeqSkipped(Event, frozen=True, kw_only=True, tag="seq_skipped"):
    """These numbers of a model's sequence never came, and later ones waited: the lane goes on."""

    first: int
    last: int


class Diverged(Event, frozen=True, kw_only=True, tag="diverged"):
    """A redo of this job gave another result than the journaled one."""

    op_no: int
    detail: str


# -- models, adapters, checkpoints ------------------------------------------------------------------


class ModelCreated(Event, frozen=True, kw_only=True, tag="model_created"):
    base_model: str
    rank: int
    alpha: float
    seed: int
    train_attn: bool
    train_mlp: bool
    train_unembed: bool
    user_metadata: dict[str, Any] = {}
    source: str | None = None


class Redone(Event, frozen=True, kw_only=True, tag="redone"):
    """A training server that had lost the model's state has it again: a snapshot was restored if there was
    one, and the operations `first` to `last` behind it were applied once more. `run_ms`: all of that."""

    first: int
    last: int
    run_ms: float


class ModelRemoved(Event, frozen=True, kw_only=True, tag="model_removed"):
    """Its client has unloaded it: it is trained no more, and of its weights only what was saved by name
    stays."""


class CheckpointSaved(Event, frozen=True, kw_only=True, tag="checkpoint_saved"):
    """Published: `directory` is complete, its files are synced and named in its manifest. The
    checkpoint's id is that of the job which saved it, for an address may be used again. `step`: the last
    optimizer step that is in it."""

    checkpoint_kind: str
    name: str
    directory: str
    size_bytes: int
    user_metadata: dict[str, str] = {}
    expires_at: float | None = None
    step: int | None = None


class CheckpointForked(Event, frozen=True, kw_only=True, tag="checkpoint_forked"):
    """A saved state that no job of the model has made: a replay of it did, up to operation `op_no`, which
    is optimizer step `step`. `edits`: what was not done as it was. It is published like any other."""

    checkpoint_id: str
    name: str
    directory: str
    size_bytes: int
    op_no: int
    step: int
    edits: list[str] = []


class CheckpointChanged(Event, frozen=True, kw_only=True, tag="checkpoint_changed"):
    """The whole of what may change: who may read it, and until when it lives."""

    checkpoint_id: str
    public: bool
    expires_at: float | None


class CheckpointDeleted(Event, frozen=True, kw_only=True, tag="checkpoint_deleted"):
    checkpoint_id: str
    reason: Literal["deleted", "expired", "overwritten"]


class AdapterExported(Event, frozen=True, kw_only=True, tag="adapter_exported"):
    """A new immutable version of a model's adapter, complete on disk. `step`: the last optimizer step that
    is in it."""

    version: int
    directory: str
    size_bytes: int
    files: dict[str, str]
    step: int | None = None


class AdapterDeleted(Event, frozen=True, kw_only=True, tag="adapter_deleted"):
    """A version is sampled from no more, and its files go: its session was finished, none of its samplers
    had a request for the retention time, its model was removed, or (a named one) its checkpoint was
    deleted."""

    reason: Literal["finished", "idle", "deleted", "removed"]


class AdapterPlaced(Event, frozen=True, kw_only=True, tag="adapter_placed"):
    """The version's state on a replica. `refused`: it will not have it, and why."""

    state: Literal["loading", "loaded", "unloading", "gone", "refused"]
    reason: str | None = None


class SnapshotTaken(Event, frozen=True, kw_only=True, tag="snapshot_taken"):
    """All of a model's state after `op_no`, complete on disk: a redo begins behind it."""

    snapshot_id: str
    op_no: int
    directory: str
    size_bytes: int


class SnapshotDropped(Event, frozen=True, kw_only=True, tag="snapshot_dropped"):
    """It is used no more: newer ones cover it, or what is on disk is not what was published."""

    snapshot_id: str
    reason: Literal["pruned", "damaged"]


class BodiesPruned(Event, frozen=True, kw_only=True, tag="bodies_pruned"):
    """So many bodies, of so many bytes, are about to be deleted: nothing needs them, and they belong to
    jobs that were submitted before `submitted_before`, or are results of such as ended before
    `finished_before`."""

    count: int
    bytes: int
    submitted_before: float
    finished_before: float


class SamplerCreated(Event, frozen=True, kw_only=True, tag="sampler_created"):
    """A sampler of the base model, or of exactly one adapter version."""

    sampler_id: str
    sampling_seq_id: int
    base_model: str
    model_path: str | None = None


AnyEvent = (
    IncarnationStarted
    | IncarnationStopped
    | TrainerStarted
    | SessionCreated
    | SessionFinished
    | SessionMoved
    | ClientFailed
    | JobAccepted
    | JobStarted
    | JobDone
    | JobFailed
    | JobCancelled
    | SeqSkipped
    | Diverged
    | Redone
    | ModelCreated
    | ModelRemoved
    | CheckpointSaved
    | CheckpointForked
    | CheckpointChanged
    | CheckpointDeleted
    | AdapterExported
    | AdapterDeleted
    | AdapterPlaced
    | SnapshotTaken
    | SnapshotDropped
    | BodiesPruned
    | SamplerCreated
)


def kind_of(event: AnyEvent | type[AnyEvent]) -> str:
    return str(event.__struct_config__.tag)


KINDS: dict[str, type[AnyEvent]] = {kind_of(event): event for event in get_args(AnyEvent)}


class Subject(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Whom an event is about: the indexed columns beside its data."""

    tenant: str | None = None
    session_id: str | None = None
    model_id: str | None = None
    job_id: str | None = None
    adapter_id: str | None = None
    replica: str | None = None


Entry = tuple[Subject, AnyEvent]


class Record(msgspec.Struct, frozen=True):
    """An event in its place: the writer gives `seq` (1, 2, 3, ... without a gap), `at` (seconds since
    the epoch, UTC) and the `incarnation` of the worker."""

    seq: int
    at: float
    incarnation: int
    subject: Subject
    event: AnyEvent
