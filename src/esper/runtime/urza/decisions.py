"""Decisions, adaptations, judgements and workflow histories: what the control plane records of a run."""

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection

from esper.contracts.assets import ArtifactRef
from esper.contracts.enums import AdaptationState
from esper.contracts.operational import Adaptation
from esper.contracts.operational import AdaptationDecision
from esper.contracts.operational import JudgeReport
from esper.runtime.urza.rows import insert_new
from esper.runtime.urza.rows import note_divergence
from esper.runtime.urza.rows import require_run
from esper.runtime.urza.tables import adaptations as adaptation_table
from esper.runtime.urza.tables import decisions as decision_table
from esper.runtime.urza.tables import histories as history_table
from esper.runtime.urza.tables import judgements as judgement_table

_S = AdaptationState

ADAPTATION_MOVES: Mapping[AdaptationState, frozenset[AdaptationState]] = {
    _S.ORDERED: frozenset(_S) - {_S.ORDERED},
    _S.DELIVERED: frozenset(_S) - {_S.ORDERED, _S.DELIVERED},
    _S.TRAINING: frozenset({_S.FOSSILIZED, _S.CULLED, _S.FAILED}),
    _S.FOSSILIZED: frozenset({_S.CULLED}),
    _S.CULLED: frozenset(),
    _S.MISSED: frozenset(),
    _S.FAILED: frozenset(),
    _S.VETOED: frozenset(),
    _S.STALE: frozenset(),
}
"""Which state may follow which; a state may be skipped, since a record may come before the one it follows.
Once grafted, an adaptation cannot be missed, vetoed or stale; a terminal state stays. What was kept may still be culled
by a person."""

_UNDER_WAY = frozenset({_S.ORDERED, _S.DELIVERED, _S.TRAINING})


@dataclass(frozen=True)
class StoredHistory:
    """The events of one workflow execution as JSON; `sequence` is its place among the executions of the run."""

    workflow_id: str
    temporal_run_id: str
    sequence: int
    events: ArtifactRef


async def record_decision(connection: AsyncConnection, decision: AdaptationDecision) -> AdaptationDecision:
    """Insert by (run, epoch), or find the first; see `Library.record_decision`."""
    await require_run(connection, decision.run_id)
    values = {"run_id": decision.run_id, "epoch": decision.epoch, "decision": decision}
    if await insert_new(connection, decision_table, values):
        return decision
    of_epoch = decision_table.c.run_id == decision.run_id, decision_table.c.epoch == decision.epoch
    first: AdaptationDecision
    first = (await connection.execute(select(decision_table.c.decision).where(*of_epoch))).scalar_one()
    await note_divergence(connection, decision.run_id, "decision", str(decision.epoch), first, decision)
    return first


async def decisions(connection: AsyncConnection, run_id: str) -> tuple[AdaptationDecision, ...]:
    """All decisions of the run, by epoch."""
    query = select(decision_table.c.decision).where(decision_table.c.run_id == run_id).order_by(decision_table.c.epoch)
    return tuple((await connection.execute(query)).scalars())


async def record_adaptation(connection: AsyncConnection, adaptation: Adaptation) -> Adaptation:
    """Insert, or advance by `ADAPTATION_MOVES`; see `Library.record_adaptation`."""
    run_id = run_of(adaptation.adaptation_id)
    await require_run(connection, run_id)
    values = {
        "adaptation_id": adaptation.adaptation_id,
        "run_id": run_id,
        "number": adaptation.number,
        "state": adaptation.state,
        "adaptation": adaptation,
    }
    if await insert_new(connection, adaptation_table, values):
        return adaptation
    mine = adaptation_table.c.adaptation_id == adaptation.adaptation_id
    query = select(adaptation_table.c.adaptation).where(mine).with_for_update()
    stored: Adaptation = (await connection.execute(query)).scalar_one()
    if not _may_replace(stored.state, adaptation.state):
        return stored
    merged = _merged(stored, adaptation)
    guarded = mine, adaptation_table.c.state == stored.state
    await connection.execute(update(adaptation_table).where(*guarded).values(state=merged.state, adaptation=merged))
    return merged


def _may_replace(old: AdaptationState, new: AdaptationState) -> bool:
    """A late or repeated record changes nothing; the present state, not yet terminal, may become known better."""
    return new in ADAPTATION_MOVES[old] or (new is old and old in _UNDER_WAY)


def _merged(old: Adaptation, new: Adaptation) -> Adaptation:
    known = {name: getattr(old, name) for name in ("kernel", "apply_step", "judge") if getattr(new, name) is None}
    return new.model_copy(update=known)


def run_of(adaptation_id: str) -> str:
    """The run of ``<run>/a<number>``."""
    return adaptation_id.rpartition("/")[0]


async def adaptations(connection: AsyncConnection, run_id: str) -> tuple[Adaptation, ...]:
    """All adaptations of the run, by number."""
    query = select(adaptation_table.c.adaptation).where(adaptation_table.c.run_id == run_id)
    return tuple((await connection.execute(query.order_by(adaptation_table.c.number))).scalars())


async def record_judgement(connection: AsyncConnection, report: JudgeReport) -> JudgeReport:
    """Insert by adaptation, or find the first; see `Library.record_judgement`."""
    await require_run(connection, report.run_id)
    values = {
        "adaptation_id": report.adaptation_id,
        "run_id": report.run_id,
        "verdict": report.verdict,
        "report": report,
    }
    if await insert_new(connection, judgement_table, values):
        return report
    mine = judgement_table.c.adaptation_id == report.adaptation_id
    first: JudgeReport = (await connection.execute(select(judgement_table.c.report).where(mine))).scalar_one()
    await note_divergence(connection, report.run_id, "judgement", report.adaptation_id, first, report)
    return first


async def judgements(connection: AsyncConnection, run_id: str) -> tuple[JudgeReport, ...]:
    """All judgements of the run, by step."""
    query = select(judgement_table.c.report).where(judgement_table.c.run_id == run_id)
    return tuple(sorted((await connection.execute(query)).scalars(), key=lambda report: report.step))


async def store_history(connection: AsyncConnection, run_id: str, history: StoredHistory) -> StoredHistory:
    """Insert, or point to the fuller history of the same execution."""
    await require_run(connection, run_id)
    place = {"run_id": run_id, "workflow_id": history.workflow_id, "temporal_run_id": history.temporal_run_id}
    content = {
        "sequence": history.sequence,
        "digest": history.events.digest,
        "size_bytes": history.events.size_bytes,
    }
    if not await insert_new(connection, history_table, {**place, **content}):
        # A history only grows, so the one that was read later holds all of the earlier.
        mine = [history_table.c[name] == value for name, value in place.items()]
        await connection.execute(update(history_table).where(*mine).values(**content))
    return history


async def histories(connection: AsyncConnection, run_id: str) -> tuple[StoredHistory, ...]:
    """All stored histories of the run, by `sequence`."""
    query = select(history_table).where(history_table.c.run_id == run_id)
    ordered = query.order_by(history_table.c.sequence, history_table.c.workflow_id, history_table.c.temporal_run_id)
    return tuple(
        StoredHistory(
            workflow_id=row.workflow_id,
            temporal_run_id=row.temporal_run_id,
            sequence=row.sequence,
            events=ArtifactRef(digest=row.digest, size_bytes=row.size_bytes),
        )
        for row in await connection.execute(ordered)
    )
