"""Kernels that fail: markers around their first executions, and facts of strikes and of an open breaker.

Revision 0003, after 0002.
"""

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"

_BEFORE = ("graft", "missed", "fossilize", "cull", "remove", "quarantine", "stop")
_AFTER = ("graft", "missed", "fossilize", "cull", "remove", "strike", "breaker", "quarantine", "stop")


def upgrade() -> None:
    """One table, and two more kinds of facts."""
    op.create_table(
        "markers",
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("adaptation_id", sa.String(length=128), nullable=False),
        sa.Column("kernel", sa.String(length=71), nullable=False),
        sa.Column("opened", sa.BigInteger(), nullable=True),
        sa.Column("crashes", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name=op.f("fk_markers_run_id_runs")),
        sa.PrimaryKeyConstraint("run_id", "adaptation_id", name=op.f("pk_markers")),
    )
    _allow(_AFTER)


def downgrade() -> None:
    """What happened to kernels is forgotten, strikes and breakers with it."""
    op.execute("DELETE FROM facts WHERE kind IN ('strike', 'breaker')")
    _allow(_BEFORE)
    op.drop_table("markers")


def _allow(kinds: tuple[str, ...]) -> None:
    words = ", ".join(f"'{kind}'" for kind in kinds)
    with op.batch_alter_table("facts", naming_convention={"ck": "ck_%(table_name)s_%(constraint_name)s"}) as facts:
        facts.drop_constraint(op.f("ck_facts_kind"), type_="check")
        facts.create_check_constraint(op.f("ck_facts_kind"), f"kind IN ({words})")
