"""Runs and their leases: who a run is, how it stands, and which process may train it."""

from collections.abc import Mapping
from typing import Any

from pydantic import JsonValue
from sqlalchemy import Row
from sqlalchemy import Select
from sqlalchemy import case
from sqlalchemy import func
from sqlalchemy import select
from sqlalchemy import true
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection

from esper.contracts.config import EsperConfig
from esper.contracts.enums import Outcome
from esper.contracts.operational import HeadRef
from esper.contracts.orders import Lease
from esper.contracts.orders import RecordOutcome
from esper.contracts.orders import RecordRun
from esper.contracts.orders import RunRecord
from esper.errors import RunConflict
from esper.runtime.failpoints import hit
from esper.runtime.urza.rows import insert_new
from esper.runtime.urza.rows import no_such_run
from esper.runtime.urza.tables import divergences as divergence_table
from esper.runtime.urza.tables import heads as head_table
from esper.runtime.urza.tables import runs as run_table

OUTCOMES: Mapping[Outcome, frozenset[Outcome]] = {
    Outcome.RUNNING: frozenset({Outcome.PAUSED, Outcome.COMPLETED, Outcome.STOPPED, Outcome.FAILED}),
    Outcome.PAUSED: frozenset({Outcome.RUNNING, Outcome.COMPLETED, Outcome.STOPPED, Outcome.FAILED}),
    # Failed without ever having run again: its checkpoint turned out to be damaged, its data to be gone.
    Outcome.STOPPED: frozenset({Outcome.RUNNING, Outcome.FAILED}),
    Outcome.FAILED: frozenset({Outcome.RUNNING}),
    Outcome.COMPLETED: frozenset(),
}
"""Which outcome may follow which: a stopped or failed run may be resumed, a completed one is done."""


async def record_run(connection: AsyncConnection, request: RecordRun, now: str) -> RunRecord:
    """Insert as RUNNING, or find it; `RunConflict` (ESP-501) if it has another configuration that is not to replace
    it."""
    values = {
        "run_id": request.run_id,
        "config": request.config,
        "outcome": Outcome.RUNNING,
        "created": now,
        "warnings": [],
    }
    await insert_new(connection, run_table, values)
    record = await run(connection, request.run_id)
    differing = _differing_keys(record.config, request.config)
    if differing and request.replaces:
        mine = run_table.c.run_id == request.run_id
        await connection.execute(update(run_table).where(mine).values(config=request.config))
        return await run(connection, request.run_id)
    if differing:
        raise RunConflict(
            "ESP-501",
            f"run {request.run_id} exists with another configuration: {', '.join(differing)} differ",
            hint="Choose another run id",
            run_id=request.run_id,
        )
    return record


def _differing_keys(first: EsperConfig, second: EsperConfig) -> list[str]:
    left, right = first.model_dump(mode="json"), second.model_dump(mode="json")
    return [
        f"{section}.{key}"
        for section in left
        for key in left[section] | right[section]
        if left[section].get(key) != right[section].get(key)
    ]


async def run(connection: AsyncConnection, run_id: str) -> RunRecord:
    """One run; `NotFoundError` (ESP-505) names near run ids."""
    row = (await connection.execute(_records().where(run_table.c.run_id == run_id))).first()
    if row is None:
        raise await no_such_run(connection, run_id)
    return _record(row)


async def runs(connection: AsyncConnection, limit: int) -> tuple[RunRecord, ...]:
    """The newest runs, newest first."""
    query = _records().order_by(run_table.c.number.desc()).limit(limit)
    return tuple(_record(row) for row in await connection.execute(query))


def _records() -> Select[Any]:
    diverged = select(func.count()).where(divergence_table.c.run_id == run_table.c.run_id).scalar_subquery()
    at_head = (head_table.c.run_id == run_table.c.run_id) & (head_table.c.digest == run_table.c.head)
    return select(
        run_table,
        head_table.c.parent.label("head_parent"),
        head_table.c.step.label("head_step"),
        head_table.c.epoch.label("head_epoch"),
        diverged.label("divergences"),
    ).join_from(run_table, head_table, at_head, isouter=True)


def _record(row: Row[Any]) -> RunRecord:
    head = None
    if row.head is not None:
        head = HeadRef(digest=row.head, parent=row.head_parent, step=row.head_step, epoch=row.head_epoch)
    return RunRecord(
        run_id=row.run_id,
        name=row.config.run.name,
        config=row.config,
        outcome=row.outcome,
        created=row.created,
        epochs=head.epoch if head else 0,
        steps=head.step if head else 0,
        lease_gen=row.lease_gen,
        head=head,
        device=row.device,
        threads=row.threads,
        parameters_start=row.parameters_start,
        finished=row.finished,
        restarts=row.restarts,
        divergences=row.divergences,
        warnings=tuple(row.warnings),
        failure=row.failure,
        lineage=row.lineage,
    )


async def finish(connection: AsyncConnection, request: RecordOutcome) -> RunRecord:
    """What a run's workflow knows of how it stands: outcome, device, end result, restarts, warnings, failure."""
    row = await _advance(connection, request.run_id, request.outcome)
    resumed = request.outcome in (Outcome.RUNNING, Outcome.PAUSED)
    failure: dict[str, JsonValue] | None = None if resumed else request.failure or row.failure
    values: dict[str, Any] = {
        "finished": None if resumed else request.finished or row.finished,
        "failure": failure,
        "restarts": max(row.restarts, request.restarts),
        "warnings": [*row.warnings, *(warning for warning in request.warnings if warning not in row.warnings)],
    }
    if request.loaded is not None:
        values["device"] = request.loaded.device
        values["threads"] = request.loaded.threads
        # A later load counts what was grown in the meantime.
        if row.parameters_start is None:
            values["parameters_start"] = request.loaded.parameters
    await connection.execute(update(run_table).where(run_table.c.run_id == request.run_id).values(**values))
    return await run(connection, request.run_id)


async def set_outcome(connection: AsyncConnection, run_id: str, outcome: Outcome) -> RunRecord:
    """The guarded move to `outcome`; `RunConflict` (ESP-504) where `OUTCOMES` does not allow it."""
    row = await _advance(connection, run_id, outcome)
    if row.outcome != outcome and outcome is Outcome.RUNNING:
        again = update(run_table).where(run_table.c.run_id == run_id).values(finished=None, failure=None)
        await connection.execute(again)
    return await run(connection, run_id)


async def _advance(connection: AsyncConnection, run_id: str, outcome: Outcome) -> Row[Any]:
    """Move the run to `outcome` if that may follow; gives the row as it was before, locked."""
    query = select(run_table).where(run_table.c.run_id == run_id).with_for_update()
    row = (await connection.execute(query)).first()
    if row is None:
        raise await no_such_run(connection, run_id)
    if row.outcome == outcome:
        return row
    if outcome not in OUTCOMES[row.outcome]:
        raise RunConflict(
            "ESP-504",
            f"run {run_id} is {row.outcome}; it cannot become {outcome}",
            hint=f"`esper-cli show {run_id}` shows how it stands",
            run_id=run_id,
        )
    guarded = run_table.c.run_id == run_id, run_table.c.outcome == row.outcome
    await connection.execute(update(run_table).where(*guarded).values(outcome=outcome))
    return row


async def claim(
    connection: AsyncConnection, run_id: str, task_queue: str, *, known: int = 0, recovers: bool = False
) -> Lease:
    """Give the run to `task_queue` under a new lease: every earlier one is stale from now on; see `Library.claim`."""
    highest = run_table.c.lease_gen
    allowed = true() if recovers else highest >= known
    taken = (
        update(run_table)
        .where(run_table.c.run_id == run_id, allowed)
        .values(lease_gen=case((highest < known, known), else_=highest) + 1, task_queue=task_queue)
        .returning(run_table.c.lease_gen)
    )
    lease_gen = (await connection.execute(taken)).scalar()
    if lease_gen is None:
        raise older_than_its_run(await run(connection, run_id), known)
    hit("lease.in_claim")
    return Lease(run_id=run_id, task_queue=task_queue, lease_gen=lease_gen)


def older_than_its_run(record: RunRecord, known: int) -> RunConflict:
    """The error for a database that has never heard of lease `known` (ESP-502)."""
    return RunConflict(
        "ESP-502",
        f"run {record.run_id}: the database knows leases up to {record.lease_gen}, "
        f"its workflow was given lease {known}: "
        "the database was restored from a copy that is older than the run",
        hint=f"Restore a newer copy, or `esper-cli recover {record.run_id}` goes on from what this one has",
        run_id=record.run_id,
    )


async def release(connection: AsyncConnection, lease: Lease) -> bool:
    """Give the lease back if it is still the run's; False when it was stale."""
    ours = run_table.c.run_id == lease.run_id, run_table.c.lease_gen == lease.lease_gen
    released = await connection.execute(update(run_table).where(*ours).values(task_queue=None))
    hit("lease.in_release")
    return released.rowcount == 1


async def lease(connection: AsyncConnection, run_id: str) -> Lease | None:
    """The lease that is held now; `None` when it was released or never taken."""
    query = select(run_table.c.lease_gen, run_table.c.task_queue).where(run_table.c.run_id == run_id)
    row = (await connection.execute(query)).first()
    if row is None:
        raise await no_such_run(connection, run_id)
    if row.task_queue is None:
        return None
    return Lease(run_id=run_id, task_queue=row.task_queue, lease_gen=row.lease_gen)
