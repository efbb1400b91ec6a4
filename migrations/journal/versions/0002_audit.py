"""steps, usage and the chain of hashes"""

from collections import defaultdict
from datetime import UTC, datetime

import sqlalchemy as sa
from alembic import op

from tink.journal import chain

revision = "0002"
down_revision = "0001"

USED = ("done", "failed", "cancelled", "training_tokens", "prompt_tokens", "sampled_tokens")
TIMES = ("training_ms", "sampling_ms")


def upgrade() -> None:
    op.add_column("events", sa.Column("hash", sa.LargeBinary(), nullable=True))
    op.add_column(
        "models", sa.Column("steps", sa.BigInteger(), server_default=sa.text("0"), nullable=False)
    )
    for table in ("jobs", "adapters", "checkpoints"):
        op.add_column(table, sa.Column("step", sa.BigInteger(), nullable=True))
    steps, retried = sa.text("step IS NOT NULL"), sa.text("attempts > 1")
    op.create_index(
        "ix_jobs_model_id_step",
        "jobs",
        ["model_id", "step"],
        sqlite_where=steps,
        postgresql_where=steps,
    )
    op.create_index(
        "ix_jobs_retried", "jobs", ["started_at"], sqlite_where=retried, postgresql_where=retried
    )
    op.drop_index("ix_jobs_submitted_at", "jobs")
    op.create_index("ix_jobs_submitted_at", "jobs", ["submitted_at", "tenant", "op", "state"])
    op.create_index("ix_adapters_created_at", "adapters", ["created_at"])
    op.create_index("ix_checkpoints_directory", "checkpoints", ["directory"])
    op.create_table(
        "steps",
        sa.Column("model_id", sa.Text(), nullable=False),
        sa.Column("step", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("jobs", sa.BigInteger(), nullable=False),
        sa.Column("updates", sa.BigInteger(), nullable=False),
        sa.Column("tokens_in", sa.BigInteger(), nullable=False),
        sa.Column("loss_sum", sa.Double(), nullable=False),
        sa.Column("run_ms", sa.Double(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=True),
        sa.Column("learning_rate", sa.Double(), nullable=True),
        sa.Column("grad_norm", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["model_id"], ["models.model_id"], name=op.f("fk_steps_model_id")),
        sa.PrimaryKeyConstraint("model_id", "step", name=op.f("pk_steps")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "usage",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("day", sa.Text(), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in USED),
        *(sa.Column(name, sa.Double(), nullable=False) for name in TIMES),
        sa.PrimaryKeyConstraint("tenant", "day", name=op.f("pk_usage")),
    )
    _go_through(op.get_bind())


# The events as this revision has them.
_events = sa.table(
    "events",
    *(sa.column(name) for name in chain.COLUMNS if name != "data"),
    sa.column("data", sa.JSON()),
    sa.column("hash", sa.LargeBinary()),
)


def _go_through(connection: sa.Connection) -> None:
    """Chains the events that are there, and adds up what was used."""
    last = chain.START
    used: defaultdict[tuple[str, str], dict[str, float]] = defaultdict(
        lambda: dict.fromkeys(USED, 0) | dict.fromkeys(TIMES, 0.0)
    )
    seq = 0
    while True:
        columns = [_events.c[name] for name in chain.COLUMNS]
        page = sa.select(*columns).where(_events.c.seq > seq).order_by(_events.c.seq).limit(5000)
        found = connection.execute(page).mappings().all()
        if not found:
            break
        hashes = []
        for row in found:
            last = chain.link(last, row)
            hashes.append({"of": row["seq"], "new": last})
            _use(used, row)
        changed = sa.update(_events).where(_events.c.seq == sa.bindparam("of"))
        connection.execute(changed.values(hash=sa.bindparam("new")), hashes)
        seq = found[-1]["seq"]
    if used:
        usage = sa.table("usage", *(sa.column(name) for name in ("tenant", "day", *USED, *TIMES)))
        connection.execute(
            sa.insert(usage), [{"tenant": key[0], "day": key[1], **sums} for key, sums in used.items()]
        )


def _use(used: defaultdict[tuple[str, str], dict[str, float]], row: sa.RowMapping) -> None:
    kind, data = row["kind"], row["data"]
    if kind not in ("job_done", "job_failed", "job_cancelled"):
        return
    sums = used[row["tenant"], datetime.fromtimestamp(row["at"], UTC).date().isoformat()]
    sums[kind.removeprefix("job_")] += 1
    if kind != "job_done":
        return
    if row["model_id"] is not None:
        sums["training_tokens"] += data["tokens_in"]
        sums["training_ms"] += data["run_ms"]
    else:
        sums["prompt_tokens"] += data["tokens_in"]
        sums["sampled_tokens"] += data["tokens_out"]
        sums["sampling_ms"] += data["run_ms"]
