"""Runs that branched off others: where each began.

Revision 0002, after 0001.
"""

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"


def upgrade() -> None:
    """One column; runs that are there already began by themselves."""
    with op.batch_alter_table("runs") as runs:
        runs.add_column(sa.Column("lineage", sa.JSON(), nullable=True))


def downgrade() -> None:
    """Branches forget where they began."""
    with op.batch_alter_table("runs") as runs:
        runs.drop_column("lineage")
