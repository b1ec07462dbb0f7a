"""The first tables: runs, heads, facts, reports, decisions, adaptations, blueprints, kernels, histories.

Revision 0001, after nothing.
"""

import sqlalchemy as sa
from alembic import op

revision: str = "0001"
down_revision: str | None = None


def upgrade() -> None:
    """From nothing to the first tables."""
    op.create_table(
        "blueprints",
        sa.Column("name", sa.String(length=512), nullable=False),
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("blueprint", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("name", "version", name=op.f("pk_blueprints")),
    )
    op.create_table(
        "kernels",
        sa.Column("number", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("blueprint", sa.String(length=512), nullable=False),
        sa.Column(
            "state",
            sa.Enum(
                "built",
                "certified",
                "rejected",
                "quarantined",
                name="state",
                native_enum=False,
                create_constraint=True,
                length=32,
            ),
            nullable=False,
        ),
        sa.Column("kernel", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_kernels")),
        sa.UniqueConstraint("digest", name=op.f("uq_kernels_digest")),
    )
    op.create_table(
        "runs",
        sa.Column("number", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column(
            "outcome",
            sa.Enum(
                "running",
                "paused",
                "completed",
                "stopped",
                "failed",
                name="outcome",
                native_enum=False,
                create_constraint=True,
                length=32,
            ),
            nullable=False,
        ),
        sa.Column("created", sa.String(length=64), nullable=False),
        sa.Column("lease_gen", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("task_queue", sa.Text(), nullable=True),
        sa.Column("head", sa.String(length=71), nullable=True),
        sa.Column("device", sa.Text(), nullable=True),
        sa.Column("threads", sa.Integer(), nullable=True),
        sa.Column("parameters_start", sa.BigInteger(), nullable=True),
        sa.Column("finished", sa.JSON(), nullable=True),
        sa.Column("restarts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("warnings", sa.JSON(), nullable=False),
        sa.Column("failure", sa.JSON(), nullable=True),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_runs")),
        sa.UniqueConstraint("run_id", name=op.f("uq_runs_run_id")),
    )
    op.create_table(
        "adaptations",
        sa.Column("adaptation_id", sa.String(length=128), nullable=False),
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column(
            "state",
            sa.Enum(
                "ordered",
                "delivered",
                "training",
                "fossilized",
                "culled",
                "missed",
                "failed",
                "vetoed",
                "stale",
                name="state",
                native_enum=False,
                create_constraint=True,
                length=32,
            ),
            nullable=False,
        ),
        sa.Column("adaptation", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name=op.f("fk_adaptations_run_id_runs")),
        sa.PrimaryKeyConstraint("adaptation_id", name=op.f("pk_adaptations")),
    )
    op.create_index(op.f("ix_adaptations_run_id"), "adaptations", ["run_id"], unique=False)
    op.create_table(
        "builds",
        sa.Column("adaptation_id", sa.String(length=128), nullable=False),
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("kernel", sa.String(length=71), nullable=False),
        sa.ForeignKeyConstraint(["kernel"], ["kernels.digest"], name=op.f("fk_builds_kernel_kernels")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name=op.f("fk_builds_run_id_runs")),
        sa.PrimaryKeyConstraint("adaptation_id", name=op.f("pk_builds")),
    )
    op.create_index(op.f("ix_builds_kernel"), "builds", ["kernel"], unique=False)
    op.create_index(op.f("ix_builds_run_id"), "builds", ["run_id"], unique=False)

    op.create_table(
        "decisions",
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("epoch", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("decision", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name=op.f("fk_decisions_run_id_runs")),
        sa.PrimaryKeyConstraint("run_id", "epoch", name=op.f("pk_decisions")),
    )
    op.create_table(
        "divergences",
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("record", sa.String(length=32), nullable=False),
        sa.Column("key", sa.String(length=128), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("second", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name=op.f("fk_divergences_run_id_runs")),
        sa.PrimaryKeyConstraint("run_id", "record", "key", "digest", name=op.f("pk_divergences")),
    )
    op.create_table(
        "facts",
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("seq", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("adaptation_id", sa.String(length=128), nullable=False),
        sa.Column(
            "kind",
            sa.Enum(
                "graft",
                "missed",
                "fossilize",
                "cull",
                "remove",
                "quarantine",
                "stop",
                name="kind",
                native_enum=False,
                create_constraint=True,
                length=32,
            ),
            nullable=False,
        ),
        sa.Column("decides", sa.String(length=32), nullable=False),
        sa.Column("apply_step", sa.BigInteger(), nullable=False),
        sa.Column("fact", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name=op.f("fk_facts_run_id_runs")),
        sa.PrimaryKeyConstraint("run_id", "seq", name=op.f("pk_facts")),
        sa.UniqueConstraint("run_id", "adaptation_id", "decides", name=op.f("uq_facts_run_id")),
    )
    op.create_table(
        "heads",
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("parent", sa.String(length=71), nullable=True),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("manifest_bytes", sa.BigInteger(), nullable=False),
        sa.Column("lease_gen", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name=op.f("fk_heads_run_id_runs")),
        sa.PrimaryKeyConstraint("run_id", "digest", name=op.f("pk_heads")),
        sa.UniqueConstraint("run_id", "number", name=op.f("uq_heads_run_id")),
    )
    op.create_table(
        "histories",
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("workflow_id", sa.String(length=512), nullable=False),
        sa.Column("temporal_run_id", sa.String(length=64), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name=op.f("fk_histories_run_id_runs")),
        sa.PrimaryKeyConstraint("run_id", "workflow_id", "temporal_run_id", name=op.f("pk_histories")),
    )
    op.create_table(
        "judgements",
        sa.Column("adaptation_id", sa.String(length=128), nullable=False),
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column(
            "verdict",
            sa.Enum("keep", "cull", "void", name="verdict", native_enum=False, create_constraint=True, length=32),
            nullable=False,
        ),
        sa.Column("report", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name=op.f("fk_judgements_run_id_runs")),
        sa.PrimaryKeyConstraint("adaptation_id", name=op.f("pk_judgements")),
    )
    op.create_index(op.f("ix_judgements_run_id"), "judgements", ["run_id"], unique=False)
    op.create_table(
        "reports",
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("epoch", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("report", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name=op.f("fk_reports_run_id_runs")),
        sa.PrimaryKeyConstraint("run_id", "epoch", name=op.f("pk_reports")),
    )
    op.create_table(
        "rewinds",
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("from_head", sa.String(length=71), nullable=False),
        sa.Column("to_head", sa.String(length=71), nullable=False),
        sa.Column("lease_gen", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name=op.f("fk_rewinds_run_id_runs")),
        sa.PrimaryKeyConstraint("run_id", "number", name=op.f("pk_rewinds")),
    )


def downgrade() -> None:
    """Drop all of them."""
    op.drop_table("rewinds")
    op.drop_table("reports")
    op.drop_table("judgements")
    op.drop_table("histories")
    op.drop_table("heads")
    op.drop_table("facts")
    op.drop_table("divergences")
    op.drop_table("decisions")

    op.drop_table("builds")
    op.drop_table("adaptations")
    op.drop_table("runs")
    op.drop_table("kernels")
    op.drop_table("blueprints")
