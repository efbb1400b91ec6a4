"""Alembic's environment for both databases. The caller (tink/journal/migrations.py) brings the connection
and the metadata; there is no alembic.ini, so that an installed package migrates like a checkout."""

from alembic import context

config = context.config

context.configure(
    connection=config.attributes["connection"],
    target_metadata=config.attributes["metadata"],
    version_table=config.attributes["version_table"],
    render_as_batch=True,
    compare_type=True,
    transaction_per_migration=True,
)
with context.begin_transaction():
    context.run_migrations()
