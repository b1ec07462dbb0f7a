"""Entering a run that branches off another: all its records as they stood at that epoch, in one transaction."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import insert
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection

from esper.contracts.assets import ArtifactRef
from esper.contracts.config import EsperConfig
from esper.contracts.operational import Adaptation
from esper.contracts.operational import AdaptationDecision
from esper.contracts.operational import EpochReport
from esper.contracts.operational import Fact
from esper.contracts.operational import HeadRef
from esper.contracts.operational import JudgeReport
from esper.contracts.orders import Lineage
from esper.errors import RunConflict
from esper.runtime.urza import decisions
from esper.runtime.urza.ledger import CommittedHead
from esper.runtime.urza.rows import insert_new
from esper.runtime.urza.tables import facts as fact_table
from esper.runtime.urza.tables import heads as head_table
from esper.runtime.urza.tables import reports as report_table
from esper.runtime.urza.tables import runs as run_table


@dataclass(frozen=True)
class Branch:
    """A run that begins with another's past: every record already bears the new run's id."""

    run_id: str
    config: EsperConfig
    lineage: Lineage
    head: HeadRef
    manifest: ArtifactRef
    facts: tuple[Fact, ...]
    reports: tuple[EpochReport, ...]
    decisions: tuple[AdaptationDecision, ...]
    adaptations: tuple[Adaptation, ...]
    judgements: tuple[JudgeReport, ...]


async def enter_branch(connection: AsyncConnection, branch: Branch, now: str) -> None:
    """Insert all of it. Raises `RunConflict` (ESP-501) when there is a run of that id; then nothing is written."""
    values = {
        "run_id": branch.run_id,
        "config": branch.config,
        "lineage": branch.lineage,
        "outcome": "running",
        "created": now,
        "warnings": [],
    }
    if not await insert_new(connection, run_table, values):
        raise RunConflict("ESP-501", f"run {branch.run_id} exists already", run_id=branch.run_id)
    await enter_past(
        connection,
        branch.run_id,
        heads=(CommittedHead(branch.head, branch.manifest, lease_gen=0),),
        facts=branch.facts,
        reports=branch.reports,
        decided=branch.decisions,
        adaptations=branch.adaptations,
        judgements=branch.judgements,
    )
    moved = update(run_table).where(run_table.c.run_id == branch.run_id).values(head=branch.head.digest)
    await connection.execute(moved)


async def enter_past(
    connection: AsyncConnection,
    run_id: str,
    *,
    heads: Sequence[CommittedHead],
    facts: Sequence[Fact],
    reports: Sequence[EpochReport],
    decided: Sequence[AdaptationDecision],
    adaptations: Sequence[Adaptation],
    judgements: Sequence[JudgeReport],
) -> None:
    """Insert what a run that was just entered has behind it: facts with the `seq` that they have, heads in the order
    of their commits, and of an adaptation each state that it was recorded in."""
    for number, item in enumerate(heads, 1):
        row: dict[str, Any] = {
            "run_id": run_id,
            "digest": item.head.digest,
            "number": number,
            "parent": item.head.parent,
            "step": item.head.step,
            "epoch": item.head.epoch,
            "manifest_bytes": item.manifest.size_bytes,
            "lease_gen": item.lease_gen,
        }
        await connection.execute(insert(head_table).values(**row))
    for fact in facts:
        row = {
            "run_id": run_id,
            "seq": fact.seq,
            "adaptation_id": fact.adaptation_id,
            "kind": fact.kind,
            "decides": fact.decides,
            "apply_step": fact.apply_step,
            "fact": fact,
        }
        await connection.execute(insert(fact_table).values(**row))
    for report in reports:
        kept = {"run_id": run_id, "epoch": report.epoch, "step": report.step, "report": report}
        await connection.execute(insert(report_table).values(**kept))
    for decision in decided:
        await decisions.record_decision(connection, decision)
    for adaptation in adaptations:
        await decisions.record_adaptation(connection, adaptation)
    for judgement in judgements:
        await decisions.record_judgement(connection, judgement)
