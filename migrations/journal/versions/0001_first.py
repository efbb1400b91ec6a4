"""the journal, first version"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "events",
        sa.Column(
            "seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False
        ),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("incarnation", sa.Integer(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=True),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=True),
        sa.Column("model_id", sa.Text(), nullable=True),
        sa.Column("job_id", sa.Text(), nullable=True),
        sa.Column("adapter_id", sa.Text(), nullable=True),
        sa.Column("replica", sa.Text(), nullable=True),
        sa.Column(
            "data",
            sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_events")),
    )
    with op.batch_alter_table("events", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_events_job_id"), ["job_id"], unique=False)
        batch_op.create_index(batch_op.f("ix_events_kind_seq"), ["kind", "seq"], unique=False)
        batch_op.create_index(batch_op.f("ix_events_model_id_seq"), ["model_id", "seq"], unique=False)

    op.create_table(
        "incarnations",
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("boot_id", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("settings_digest", sa.Text(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("stopped_at", sa.Double(), nullable=True),
        sa.Column("stop_reason", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_incarnations")),
    )
    op.create_table(
        "sessions",
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column(
            "tags",
            sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql"),
            nullable=False,
        ),
        sa.Column(
            "user_metadata",
            sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql"),
            nullable=False,
        ),
        sa.Column("sdk_version", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), nullable=True),
        sa.Column("display_name", sa.Text(), nullable=True),
        sa.Column("idempotency_key", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.Column("finish_reason", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("session_id", name=op.f("pk_sessions")),
    )
    with op.batch_alter_table("sessions", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_sessions_tenant_idempotency_key"), ["tenant", "idempotency_key"], unique=True
        )

    op.create_table(
        "models",
        sa.Column("model_id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("model_seq_id", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=True),
        sa.Column("rank", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("alpha", sa.Double(), nullable=True),
        sa.Column("seed", sa.BigInteger(), nullable=True),
        sa.Column("train_attn", sa.Boolean(), nullable=True),
        sa.Column("train_mlp", sa.Boolean(), nullable=True),
        sa.Column("train_unembed", sa.Boolean(), nullable=True),
        sa.Column(
            "user_metadata",
            sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql"),
            nullable=False,
        ),
        sa.Column("source", sa.Text(), nullable=True),
        sa.Column("op_no", sa.BigInteger(), nullable=False),
        sa.Column("next_seq", sa.BigInteger(), nullable=False),
        sa.Column("versions", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("last_request_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.session_id"], name=op.f("fk_models_session_id")),
        sa.PrimaryKeyConstraint("model_id", name=op.f("pk_models")),
    )
    with op.batch_alter_table("models", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_models_session_id_model_seq_id"), ["session_id", "model_seq_id"], unique=True
        )

    op.create_table(
        "adapters",
        sa.Column("adapter_id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("model_id", sa.Text(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("directory", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column(
            "files",
            sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql"),
            nullable=False,
        ),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("deleted_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["model_id"], ["models.model_id"], name=op.f("fk_adapters_model_id")),
        sa.PrimaryKeyConstraint("adapter_id", name=op.f("pk_adapters")),
    )
    with op.batch_alter_table("adapters", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_adapters_model_id_version"), ["model_id", "version"], unique=True
        )
        batch_op.create_index(
            "ix_adapters_live",
            ["adapter_id"],
            unique=False,
            sqlite_where=sa.text("state = 'live'"),
            postgresql_where=sa.text("state = 'live'"),
        )

    op.create_table(
        "checkpoints",
        sa.Column("checkpoint_id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("model_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("directory", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("adapter_id", sa.Text(), nullable=True),
        sa.Column("public", sa.Boolean(), nullable=False),
        sa.Column(
            "user_metadata",
            sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql"),
            nullable=False,
        ),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.Column("deleted_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["model_id"], ["models.model_id"], name=op.f("fk_checkpoints_model_id")),
        sa.PrimaryKeyConstraint("checkpoint_id", name=op.f("pk_checkpoints")),
    )
    with op.batch_alter_table("checkpoints", schema=None) as batch_op:
        batch_op.create_index(
            "uq_checkpoints_live",
            ["model_id", "kind", "name"],
            unique=True,
            sqlite_where=sa.text("state = 'live'"),
            postgresql_where=sa.text("state = 'live'"),
        )

    op.create_table(
        "adapter_placements",
        sa.Column("adapter_id", sa.Text(), nullable=False),
        sa.Column("replica", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("changed_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapters.adapter_id"], name=op.f("fk_adapter_placements_adapter_id")
        ),
        sa.PrimaryKeyConstraint("adapter_id", "replica", name=op.f("pk_adapter_placements")),
    )
    op.create_table(
        "samplers",
        sa.Column("sampler_id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("sampling_seq_id", sa.BigInteger(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("model_path", sa.Text(), nullable=True),
        sa.Column("adapter_id", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapters.adapter_id"], name=op.f("fk_samplers_adapter_id")
        ),
        sa.ForeignKeyConstraint(
            ["session_id"], ["sessions.session_id"], name=op.f("fk_samplers_session_id")
        ),
        sa.PrimaryKeyConstraint("sampler_id", name=op.f("pk_samplers")),
    )
    with op.batch_alter_table("samplers", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_samplers_adapter_id"), ["adapter_id"], unique=False)
        batch_op.create_index(
            batch_op.f("ix_samplers_session_id_sampling_seq_id"),
            ["session_id", "sampling_seq_id"],
            unique=True,
        )

    op.create_table(
        "jobs",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("op", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=True),
        sa.Column("model_id", sa.Text(), nullable=True),
        sa.Column("sampler_id", sa.Text(), nullable=True),
        sa.Column("seq_id", sa.BigInteger(), nullable=False),
        sa.Column("key", sa.Text(), nullable=True),
        sa.Column("model_seq_id", sa.BigInteger(), nullable=True),
        sa.Column("op_no", sa.BigInteger(), nullable=True),
        sa.Column("attempts", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("backend", sa.Text(), nullable=True),
        sa.Column("directory", sa.Text(), nullable=True),
        sa.Column("accepted_seq", sa.BigInteger(), nullable=False),
        sa.Column("submitted_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.Column("body_sha256", sa.Text(), nullable=True),
        sa.Column("body_bytes", sa.BigInteger(), nullable=False),
        sa.Column("codec", sa.Text(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=True),
        sa.Column("num_samples", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("tokens_in", sa.BigInteger(), nullable=False),
        sa.Column("tokens_out", sa.BigInteger(), nullable=False),
        sa.Column("loss_sum", sa.Double(), nullable=True),
        sa.Column("queue_ms", sa.Double(), nullable=True),
        sa.Column("run_ms", sa.Double(), nullable=True),
        sa.Column("idle_ms", sa.Double(), nullable=True),
        sa.Column(
            "result",
            sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql"),
            nullable=True,
        ),
        sa.Column("result_sha256", sa.Text(), nullable=True),
        sa.Column("result_bytes", sa.BigInteger(), nullable=False),
        sa.Column("error_category", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["accepted_seq"], ["events.seq"], name=op.f("fk_jobs_accepted_seq")),
        sa.ForeignKeyConstraint(["sampler_id"], ["samplers.sampler_id"], name=op.f("fk_jobs_sampler_id")),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.session_id"], name=op.f("fk_jobs_session_id")),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_jobs")),
    )
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.create_index(
            "ix_jobs_open",
            ["accepted_seq"],
            unique=False,
            sqlite_where=sa.text("state IN ('accepted', 'running')"),
            postgresql_where=sa.text("state IN ('accepted', 'running')"),
        )
        batch_op.create_index(batch_op.f("ix_jobs_submitted_at"), ["submitted_at"], unique=False)
        batch_op.create_index(
            batch_op.f("ix_jobs_body_sha256"),
            ["body_sha256"],
            unique=False,
            sqlite_where=sa.text("body_sha256 IS NOT NULL"),
            postgresql_where=sa.text("body_sha256 IS NOT NULL"),
        )
        batch_op.create_index(
            batch_op.f("ix_jobs_result_sha256"),
            ["result_sha256"],
            unique=False,
            sqlite_where=sa.text("result_sha256 IS NOT NULL"),
            postgresql_where=sa.text("result_sha256 IS NOT NULL"),
        )
        batch_op.create_index(
            "ix_jobs_loads",
            ["model_id", "op_no"],
            unique=False,
            sqlite_where=sa.text("op = 'load_weights'"),
            postgresql_where=sa.text("op = 'load_weights'"),
        )
        batch_op.create_index(
            "uq_jobs_model_id_key",
            ["model_id", "key"],
            unique=True,
            sqlite_where=sa.text("key IS NOT NULL"),
            postgresql_where=sa.text("key IS NOT NULL"),
        )
        batch_op.create_index(
            "uq_jobs_tenant_key",
            ["tenant", "key"],
            unique=True,
            sqlite_where=sa.text("key IS NOT NULL AND model_id IS NULL"),
            postgresql_where=sa.text("key IS NOT NULL AND model_id IS NULL"),
        )
        batch_op.create_index("uq_jobs_model_id_op_no", ["model_id", "op_no"], unique=True)
        batch_op.create_index("uq_jobs_model_id_seq_id", ["model_id", "seq_id"], unique=True)
        batch_op.create_index("uq_jobs_sampler_id_seq_id", ["sampler_id", "seq_id"], unique=True)
        batch_op.create_index(
            "uq_jobs_session_id_model_seq_id", ["session_id", "model_seq_id"], unique=True
        )
    op.create_table(
        "snapshots",
        sa.Column("snapshot_id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("model_id", sa.Text(), nullable=False),
        sa.Column("op_no", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("directory", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("dropped_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["model_id"], ["models.model_id"], name=op.f("fk_snapshots_model_id")),
        sa.PrimaryKeyConstraint("snapshot_id", name=op.f("pk_snapshots")),
    )
    with op.batch_alter_table("snapshots", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_snapshots_model_id_op_no"), ["model_id", "op_no"], unique=False
        )
        batch_op.create_index(
            "ix_snapshots_live",
            ["snapshot_id"],
            unique=False,
            sqlite_where=sa.text("state = 'live'"),
            postgresql_where=sa.text("state = 'live'"),
        )
        batch_op.create_index(
            "ix_snapshots_damaged",
            ["dropped_at"],
            unique=False,
            sqlite_where=sa.text("state = 'damaged'"),
            postgresql_where=sa.text("state = 'damaged'"),
        )


def downgrade() -> None:
    op.drop_table("snapshots")
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_index("uq_jobs_session_id_model_seq_id")
        batch_op.drop_index("uq_jobs_sampler_id_seq_id")
        batch_op.drop_index("uq_jobs_model_id_seq_id")
        batch_op.drop_index("uq_jobs_model_id_op_no")
        batch_op.drop_index(
            "uq_jobs_tenant_key",
            sqlite_where=sa.text("key IS NOT NULL AND model_id IS NULL"),
            postgresql_where=sa.text("key IS NOT NULL AND model_id IS NULL"),
        )
        batch_op.drop_index(
            "uq_jobs_model_id_key",
            sqlite_where=sa.text("key IS NOT NULL"),
            postgresql_where=sa.text("key IS NOT NULL"),
        )
        batch_op.drop_index(
            "ix_jobs_loads",
            sqlite_where=sa.text("op = 'load_weights'"),
            postgresql_where=sa.text("op = 'load_weights'"),
        )
        batch_op.drop_index(
            batch_op.f("ix_jobs_result_sha256"),
            sqlite_where=sa.text("result_sha256 IS NOT NULL"),
            postgresql_where=sa.text("result_sha256 IS NOT NULL"),
        )
        batch_op.drop_index(
            batch_op.f("ix_jobs_body_sha256"),
            sqlite_where=sa.text("body_sha256 IS NOT NULL"),
            postgresql_where=sa.text("body_sha256 IS NOT NULL"),
        )
        batch_op.drop_index(batch_op.f("ix_jobs_submitted_at"))
        batch_op.drop_index(
            "ix_jobs_open",
            sqlite_where=sa.text("state IN ('accepted', 'running')"),
            postgresql_where=sa.text("state IN ('accepted', 'running')"),
        )

    op.drop_table("jobs")
    with op.batch_alter_table("samplers", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_samplers_session_id_sampling_seq_id"))
        batch_op.drop_index(batch_op.f("ix_samplers_adapter_id"))

    op.drop_table("samplers")
    op.drop_table("adapter_placements")
    with op.batch_alter_table("checkpoints", schema=None) as batch_op:
        batch_op.drop_index(
            "uq_checkpoints_live",
            sqlite_where=sa.text("state = 'live'"),
            postgresql_where=sa.text("state = 'live'"),
        )

    op.drop_table("checkpoints")
    with op.batch_alter_table("adapters", schema=None) as batch_op:
        batch_op.drop_index(
            "ix_adapters_live",
            sqlite_where=sa.text("state = 'live'"),
            postgresql_where=sa.text("state = 'live'"),
        )
        batch_op.drop_index(batch_op.f("ix_adapters_model_id_version"))

    op.drop_table("adapters")
    with op.batch_alter_table("models", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_models_session_id_model_seq_id"))

    op.drop_table("models")
    with op.batch_alter_table("sessions", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_sessions_tenant_idempotency_key"))

    op.drop_table("sessions")
    op.drop_table("incarnations")
    with op.batch_alter_table("events", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_events_model_id_seq"))
        batch_op.drop_index(batch_op.f("ix_events_kind_seq"))
        batch_op.drop_index(batch_op.f("ix_events_job_id"))

    op.drop_table("events")
