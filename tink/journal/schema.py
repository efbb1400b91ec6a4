"""The journal's tables. Their names and columns are part of the product: people query them.

`events` is the truth; the others are its projections (domain/projection.py), written in the event's own
transaction. Times are seconds since the epoch, UTC. Changes here need a migration (migrations/), which
`alembic check` verifies.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    TextClause,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQL NULL for None, on both databases: a JSON `null` would be a second way to say nothing.
Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
# SQLite makes only an INTEGER PRIMARY KEY the table's own b-tree key; PostgreSQL's INTEGER ends at 2**31,
# and what a client names may be larger.
Whole = BigInteger().with_variant(Integer(), "sqlite")

# The condition of the partial index on open jobs, word for word in the queries that are to use it: a
# database does not recognise it in bound parameters.
OPEN_JOBS = text("state IN ('accepted', 'running')")
# Of jobs that a repeat is not known of by its number.
KEYED = text("key IS NOT NULL")
KEYED_SAMPLES = text("key IS NOT NULL AND model_id IS NULL")
# Of adapters, checkpoints and snapshots.
LIVE = text("state = 'live'")
# Of samplers and models that go on (domain/memory.py says the same of a ledger).
SAMPLED = text(
    "adapter_id IS NULL AND session_id IN (SELECT session_id FROM sessions WHERE state = 'open')"
    " OR adapter_id IN (SELECT adapter_id FROM adapters WHERE state = 'live')"
    " OR sampler_id IN (SELECT sampler_id FROM jobs WHERE state IN ('accepted', 'running'))"
)
TRAINED = text(
    "state NOT IN ('failed', 'removed')"
    " OR model_id IN (SELECT model_id FROM adapters WHERE state = 'live')"
    " OR model_id IN (SELECT model_id FROM checkpoints WHERE state = 'live')"
    " OR model_id IN (SELECT model_id FROM snapshots WHERE state = 'live')"
    " OR model_id IN (SELECT model_id FROM jobs WHERE state IN ('accepted', 'running'))"
)
# What retention asks for.
LOADS = text("op = 'load_weights'")
DAMAGED = text("state = 'damaged'")


def _where(condition: TextClause) -> dict[str, Any]:
    """Of a partial index."""
    return {"sqlite_where": condition, "postgresql_where": condition}


events = Table(
    "events",
    metadata,
    Column("seq", Whole, primary_key=True, autoincrement=False),
    Column("at", Double, nullable=False),
    Column("incarnation", Integer, nullable=False),
    Column("tenant", Text),
    Column("kind", Text, nullable=False),
    Column("session_id", Text),
    Column("model_id", Text),
    Column("job_id", Text),
    Column("adapter_id", Text),
    Column("replica", Text),
    Column("data", Json, nullable=False),
    # sha256 over the hash of the event before and this row (journal/chain.py).
    Column("hash", LargeBinary),
    Index(None, "job_id"),
    Index(None, "model_id", "seq"),
    Index(None, "kind", "seq"),
)

incarnations = Table(
    "incarnations",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("boot_id", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("settings_digest", Text, nullable=False),
    Column("started_at", Double, nullable=False),
    Column("stopped_at", Double),
    Column("stop_reason", Text),
)

sessions = Table(
    "sessions",
    metadata,
    Column("session_id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("tags", Json, nullable=False),
    Column("user_metadata", Json, nullable=False),
    Column("sdk_version", Text, nullable=False),
    Column("project_id", Text),
    Column("display_name", Text),
    Column("idempotency_key", Text),
    Column("created_at", Double, nullable=False),
    Column("finished_at", Double),
    Column("finish_reason", Text),
    Index(None, "tenant", "idempotency_key", unique=True),
)

models = Table(
    "models",
    metadata,
    Column("model_id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("session_id", Text, ForeignKey("sessions.session_id"), nullable=False),
    Column("model_seq_id", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("base_model", Text),
    Column("rank", Whole),
    Column("alpha", Double),
    Column("seed", BigInteger),
    Column("train_attn", Boolean),
    Column("train_mlp", Boolean),
    Column("train_unembed", Boolean),
    Column("user_metadata", Json, nullable=False),
    Column("source", Text),
    Column("op_no", BigInteger, nullable=False),
    Column("next_seq", BigInteger, nullable=False),
    Column("versions", BigInteger, nullable=False),
    Column("steps", BigInteger, nullable=False, server_default=text("0")),
    Column("created_at", Double, nullable=False),
    Column("last_request_at", Double, nullable=False),
    Index(None, "session_id", "model_seq_id", unique=True),
)

samplers = Table(
    "samplers",
    metadata,
    Column("sampler_id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("session_id", Text, ForeignKey("sessions.session_id"), nullable=False),
    Column("sampling_seq_id", BigInteger, nullable=False),
    Column("base_model", Text, nullable=False),
    Column("model_path", Text),
    Column("adapter_id", Text, ForeignKey("adapters.adapter_id")),
    Column("created_at", Double, nullable=False),
    Index(None, "session_id", "sampling_seq_id", unique=True),
    Index(None, "adapter_id"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("job_id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("op", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("session_id", Text, ForeignKey("sessions.session_id")),
    Column("model_id", Text),
    Column("sampler_id", Text, ForeignKey("samplers.sampler_id")),
    Column("seq_id", BigInteger, nullable=False),
    Column("key", Text),
    Column("model_seq_id", BigInteger),
    Column("op_no", BigInteger),
    Column("attempts", Whole, nullable=False),
    Column("backend", Text),
    Column("directory", Text),
    Column("accepted_seq", BigInteger, ForeignKey("events.seq"), nullable=False),
    Column("submitted_at", Double, nullable=False),
    Column("started_at", Double),
    Column("finished_at", Double),
    Column("step", BigInteger),
    Column("body_sha256", Text),
    Column("body_bytes", BigInteger, nullable=False),
    Column("codec", Text, nullable=False),
    Column("seed", BigInteger),
    Column("num_samples", Whole),
    Column("tokens_in", BigInteger, nullable=False),
    Column("tokens_out", BigInteger, nullable=False),
    Column("loss_sum", Double),
    Column("queue_ms", Double),
    Column("run_ms", Double),
    Column("idle_ms", Double),
    Column("result", Json),
    Column("result_sha256", Text),
    Column("result_bytes", BigInteger, nullable=False),
    Column("error_category", Text),
    Column("error", Text),
    # The identity of a job, whatever its body: a repeat finds the first one.
    Index("uq_jobs_model_id_seq_id", "model_id", "seq_id", unique=True),
    Index("uq_jobs_model_id_key", "model_id", "key", unique=True, **_where(KEYED)),
    Index("uq_jobs_session_id_model_seq_id", "session_id", "model_seq_id", unique=True),
    Index("uq_jobs_sampler_id_seq_id", "sampler_id", "seq_id", unique=True),
    Index("uq_jobs_tenant_key", "tenant", "key", unique=True, **_where(KEYED_SAMPLES)),
    Index("uq_jobs_model_id_op_no", "model_id", "op_no", unique=True),
    # Recovery reads open jobs only, however long the history is.
    Index("ix_jobs_open", "accepted_seq", **_where(OPEN_JOBS)),
    # The newest of a tenant, of a kind or in a state, however far they are between: what is looked at is in
    # the index. A tenant's own index would be taken for questions about one of its models, too.
    Index("ix_jobs_submitted_at", "submitted_at", "tenant", "op", "state"),
    # Retention asks of a body who names it, and which states were loaded.
    Index(None, "body_sha256", **_where(text("body_sha256 IS NOT NULL"))),
    Index(None, "result_sha256", **_where(text("result_sha256 IS NOT NULL"))),
    Index("ix_jobs_loads", "model_id", "op_no", **_where(LOADS)),
    # What the views of journal/views.py ask.
    Index(None, "model_id", "step", **_where(text("step IS NOT NULL"))),
    Index("ix_jobs_retried", "started_at", **_where(text("attempts > 1"))),
)

adapters = Table(
    "adapters",
    metadata,
    Column("adapter_id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("model_id", Text, ForeignKey("models.model_id"), nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("job_id", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("directory", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("files", Json, nullable=False),
    Column("step", BigInteger),
    Column("created_at", Double, nullable=False),
    Column("deleted_at", Double),
    Index(None, "model_id", "version", unique=True),
    Index("ix_adapters_live", "adapter_id", **_where(LIVE)),
    Index(None, "created_at"),
)

adapter_placements = Table(
    "adapter_placements",
    metadata,
    Column("adapter_id", Text, ForeignKey("adapters.adapter_id"), primary_key=True),
    Column("replica", Text, primary_key=True),
    Column("state", Text, nullable=False),
    Column("changed_at", Double, nullable=False),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("checkpoint_id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("model_id", Text, ForeignKey("models.model_id"), nullable=False),
    Column("kind", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("directory", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("adapter_id", Text),
    Column("step", BigInteger),
    Column("public", Boolean, nullable=False),
    Column("user_metadata", Json, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Column("deleted_at", Double),
    # An address is used by one live checkpoint at a time.
    Index(
        "uq_checkpoints_live",
        "model_id",
        "kind",
        "name",
        unique=True,
        **_where(LIVE),
    ),
    # Where a model's weights came from: a load names the directory.
    Index(None, "directory"),
)

snapshots = Table(
    "snapshots",
    metadata,
    Column("snapshot_id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("model_id", Text, ForeignKey("models.model_id"), nullable=False),
    Column("op_no", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("directory", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("dropped_at", Double),
    Index(None, "model_id", "op_no"),
    Index("ix_snapshots_live", "snapshot_id", **_where(LIVE)),
    Index("ix_snapshots_damaged", "dropped_at", **_where(DAMAGED)),
)

steps = Table(
    "steps",
    metadata,
    Column("model_id", Text, ForeignKey("models.model_id"), primary_key=True),
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("tenant", Text, nullable=False),
    Column("jobs", BigInteger, nullable=False),
    Column("updates", BigInteger, nullable=False),
    Column("tokens_in", BigInteger, nullable=False),
    Column("loss_sum", Double, nullable=False),
    Column("run_ms", Double, nullable=False),
    Column("job_id", Text),
    Column("learning_rate", Double),
    Column("grad_norm", Double),
    Column("finished_at", Double),
    # By its key on disk: an audit goes through all of it.
    sqlite_with_rowid=False,
)

usage = Table(
    "usage",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("day", Text, primary_key=True),
    *(
        Column(name, BigInteger, nullable=False)
        for name in ("done", "failed", "cancelled", "training_tokens", "prompt_tokens", "sampled_tokens")
    ),
    Column("training_ms", Double, nullable=False),
    Column("sampling_ms", Double, nullable=False),
)


def _bodies(name: str, metadata: MetaData) -> Table:
    return Table(
        name,
        metadata,
        Column("sha256", Text, primary_key=True),
        Column("size", BigInteger, nullable=False),
        Column("stored_at", Double, nullable=False),
        Column("content", LargeBinary, nullable=False),
        # Retention takes the oldest first.
        Index(f"ix_{name}_stored_at", "stored_at", "sha256"),
    )


# A short body is committed with the event that names it.
short_bodies = _bodies("short_bodies", metadata)

# Longer bodies live beside the journal, with a writer lane of their own: eight of them would hold the
# events' lane for 50 ms. On SQLite that is another file.
bodies_metadata = MetaData()
bodies = _bodies("bodies", bodies_metadata)
