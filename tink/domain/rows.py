"""The rows of the projections: one struct per table, one field per column (journal/schema.py says how
each is stored). They hold what the events say, and nothing that is not in an event."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgspec

from tink.domain.events import Subject

JobState = Literal["accepted", "running", "done", "failed", "cancelled"]

OPEN: frozenset[JobState] = frozenset({"accepted", "running"})


# gc=False, here and in the events' Subject: a fold makes millions of them, and nothing that they hold can
# lead back to them.
class Row(msgspec.Struct, kw_only=True, gc=False):
    # The columns that several events add to; what else they say stays.
    SUMS: ClassVar[frozenset[str]] = frozenset()

    @property
    def ended(self) -> bool:
        """Nothing more will happen to it: a worker has no need to keep it in memory."""
        return False


class Incarnation(Row, kw_only=True):
    number: int
    boot_id: str
    version: str
    settings_digest: str
    started_at: float
    stopped_at: float | None = None
    stop_reason: str | None = None


class Session(Row, kw_only=True):
    session_id: str
    tenant: str
    state: Literal["open", "finished"] = "open"
    tags: list[str]
    user_metadata: dict[str, Any]
    sdk_version: str
    project_id: str | None
    display_name: str | None
    idempotency_key: str | None
    created_at: float
    finished_at: float | None = None
    finish_reason: str | None = None


class Model(Row, kw_only=True):
    """`op_no`: the last one given. `next_seq`: the sequence number that the lane waits for. `versions`:
    how many of its adapter were exported."""

    model_id: str
    tenant: str
    session_id: str
    model_seq_id: int
    state: Literal["creating", "live", "failed", "removed"] = "creating"
    base_model: str | None = None
    rank: int | None = None
    alpha: float | None = None
    seed: int | None = None
    train_attn: bool | None = None
    train_mlp: bool | None = None
    train_unembed: bool | None = None
    user_metadata: dict[str, Any] = {}
    source: str | None = None
    op_no: int = 0
    next_seq: int = 0
    versions: int = 0
    steps: int = 0
    created_at: float
    last_request_at: float


class Job(Row, kw_only=True):
    job_id: str
    tenant: str
    op: str
    state: JobState = "accepted"
    session_id: str | None
    model_id: str | None
    sampler_id: str | None
    seq_id: int
    key: str | None = None
    model_seq_id: int | None
    op_no: int | None = None
    attempts: int = 0
    backend: str | None = None
    directory: str | None = None
    accepted_seq: int
    submitted_at: float
    started_at: float | None = None
    finished_at: float | None = None
    step: int | None = None
    body_sha256: str | None
    body_bytes: int
    codec: str
    seed: int | None
    num_samples: int | None
    tokens_in: int = 0
    tokens_out: int = 0
    loss_sum: float | None = None
    queue_ms: float | None = None
    run_ms: float | None = None
    idle_ms: float | None = None
    result: dict[str, Any] | None = None
    result_sha256: str | None = None
    result_bytes: int = 0
    error_category: str | None = None
    error: str | None = None

    @property
    def ended(self) -> bool:
        return self.state not in OPEN

    def queued_ms(self, now: float) -> float:
        """For how long it has waited, if it begins now. A wall clock may have been set back."""
        return max(0.0, now - self.submitted_at) * 1000


class Sampler(Row, kw_only=True):
    sampler_id: str
    tenant: str
    session_id: str
    sampling_seq_id: int
    base_model: str
    model_path: str | None
    adapter_id: str | None
    created_at: float


class Adapter(Row, kw_only=True):
    """`state`: `live`, or why it was deleted."""

    adapter_id: str
    tenant: str
    model_id: str
    version: int
    job_id: str
    state: Literal["live", "finished", "idle", "deleted", "removed"] = "live"
    directory: str
    size_bytes: int
    files: dict[str, str]
    step: int | None = None
    created_at: float
    deleted_at: float | None = None

    @property
    def ended(self) -> bool:
        return self.state != "live"


class AdapterPlacement(Row, kw_only=True):
    adapter_id: str
    replica: str
    state: Literal["loading", "loaded", "unloading", "gone", "refused"]
    changed_at: float


class Checkpoint(Row, kw_only=True):
    checkpoint_id: str
    tenant: str
    model_id: str
    kind: str
    name: str
    state: Literal["live", "deleted", "expired", "overwritten"] = "live"
    directory: str
    size_bytes: int
    adapter_id: str | None
    step: int | None = None
    public: bool = False
    user_metadata: dict[str, str]
    created_at: float
    expires_at: float | None
    deleted_at: float | None = None

    @property
    def ended(self) -> bool:
        return self.state != "live"

    @property
    def address(self) -> str:
        return f"tinker://{self.model_id}/{self.kind}/{self.name}"


class Snapshot(Row, kw_only=True):
    snapshot_id: str
    tenant: str
    model_id: str
    op_no: int
    state: Literal["live", "pruned", "damaged"] = "live"
    directory: str
    size_bytes: int
    created_at: float
    dropped_at: float | None = None

    @property
    def ended(self) -> bool:
        return self.state != "live"


class Step(Row, kw_only=True):
    """An optimizer step of a model: what the jobs that made it add up to."""

    SUMS: ClassVar[frozenset[str]] = frozenset({"jobs", "updates", "tokens_in", "loss_sum", "run_ms"})

    model_id: str
    step: int
    tenant: str
    jobs: int
    updates: int
    tokens_in: int
    loss_sum: float
    run_ms: float
    job_id: str | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    finished_at: float | None = None


class Usage(Row, kw_only=True):
    """What the jobs of a tenant that ended on a day (UTC) add up to."""

    SUMS: ClassVar[frozenset[str]] = frozenset(
        {"done", "failed", "cancelled", "training_tokens", "prompt_tokens", "sampled_tokens"}
        | {"training_ms", "sampling_ms"}
    )

    tenant: str
    day: str
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    training_tokens: int = 0
    prompt_tokens: int = 0
    sampled_tokens: int = 0
    training_ms: float = 0.0
    sampling_ms: float = 0.0


# table -> (row type, primary key)
TABLES: dict[str, tuple[type[Row], tuple[str, ...]]] = {
    "incarnations": (Incarnation, ("number",)),
    "sessions": (Session, ("session_id",)),
    "models": (Model, ("model_id",)),
    "jobs": (Job, ("job_id",)),
    "samplers": (Sampler, ("sampler_id",)),
    "adapters": (Adapter, ("adapter_id",)),
    "adapter_placements": (AdapterPlacement, ("adapter_id", "replica")),
    "checkpoints": (Checkpoint, ("checkpoint_id",)),
    "snapshots": (Snapshot, ("snapshot_id",)),
    "steps": (Step, ("model_id", "step")),
    "usage": (Usage, ("tenant", "day")),
}


def about(row: Job | Adapter | Checkpoint | Snapshot, **more: str | None) -> Subject:
    """Whom an event is about that happens to the row."""
    match row:
        case Job():
            more |= {"session_id": row.session_id, "job_id": row.job_id}
        case Adapter() | Checkpoint():
            more |= {"adapter_id": row.adapter_id}
    return Subject(tenant=row.tenant, model_id=row.model_id, **more)
