"""short bodies in the journal"""

import sqlalchemy as sa
from alembic import op

# A grant by default may give the new table to roles that were not to read the bodies.
AS_OF_BODIES = """
DO $$
DECLARE
    unwanted text;
BEGIN
    IF to_regclass('bodies') IS NULL THEN
        RETURN;
    END IF;
    FOR unwanted IN
        SELECT DISTINCT CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END
        FROM pg_class, aclexplode(relacl)
        WHERE oid = 'short_bodies'::regclass AND grantee <> relowner AND grantee NOT IN (
            SELECT grantee FROM pg_class, aclexplode(relacl)
            WHERE oid = 'bodies'::regclass AND privilege_type = 'SELECT'
        )
    LOOP
        EXECUTE 'REVOKE ALL ON short_bodies FROM ' || unwanted;
    END LOOP;
END $$
"""

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "short_bodies",
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("stored_at", sa.Double(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_short_bodies")),
    )
    op.create_index("ix_short_bodies_stored_at", "short_bodies", ["stored_at", "sha256"])
    if op.get_bind().dialect.name == "postgresql":
        op.execute(AS_OF_BODIES)
