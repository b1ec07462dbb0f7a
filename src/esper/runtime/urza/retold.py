"""Entering runs into a lost database's successor, as they were told again: all of a run, or nothing of it."""

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func
from sqlalchemy import insert
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from esper.contracts.assets import Kernel
from esper.contracts.enums import FactKind
from esper.contracts.operational import Adaptation
from esper.contracts.operational import AdaptationDecision
from esper.contracts.operational import EpochReport
from esper.contracts.operational import Fact
from esper.contracts.operational import JudgeReport
from esper.contracts.orders import Lease
from esper.contracts.orders import RunRecord
from esper.errors import RunConflict
from esper.runtime.urza import branches
from esper.runtime.urza import decisions
from esper.runtime.urza import kernels
from esper.runtime.urza import ledger
from esper.runtime.urza import markers
from esper.runtime.urza.decisions import StoredHistory
from esper.runtime.urza.ledger import CommittedHead
from esper.runtime.urza.ledger import Drift
from esper.runtime.urza.ledger import Rewind
from esper.runtime.urza.tables import rewinds as rewind_table
from esper.runtime.urza.tables import runs as run_table


@dataclass(frozen=True)
class RetoldRun:
    """All records of one run. Of `record` the head, the counts and the divergences follow from the others; nobody
    holds its lease."""

    record: RunRecord
    head: str | None
    heads: tuple[CommittedHead, ...]
    rewinds: tuple[Rewind, ...]
    drifts: tuple[Drift, ...]
    facts: tuple[Fact, ...]
    reports: tuple[EpochReport, ...]
    decisions: tuple[AdaptationDecision, ...]
    adaptations: tuple[Adaptation, ...]
    """Every state that was recorded, in that order."""
    judgements: tuple[JudgeReport, ...]
    kernels: tuple[tuple[str | None, Kernel], ...]
    """Each with the adaptation that it was published for; `None`: one of another run."""
    histories: tuple[StoredHistory, ...]

    @property
    def present(self) -> CommittedHead | None:
        """Where the run stands; `None` before its first head."""
        return next((item for item in self.heads if item.head.digest == self.head), None)


async def require_empty(connection: AsyncConnection, database: str) -> None:
    """Raises `RunConflict` (ESP-504) when there is any run: what a database has is never overwritten."""
    count = (await connection.execute(select(func.count()).select_from(run_table))).scalar_one()
    if count:
        raise RunConflict(
            "ESP-504",
            f"database {database} holds {count} runs: it is not overwritten",
            hint="Move it away (a SQLite file with its -wal and -shm files), then rebuild into a new one",
        )


async def enter_retold(connection: AsyncConnection, retold: Sequence[RetoldRun], database: str) -> Mapping[str, str]:
    """Insert them into a database without runs, in one transaction; why not, by run id, of those that the database
    refuses. Raises `RunConflict` (ESP-504) when it has runs."""
    await require_empty(connection, database)
    refused = {}
    for run in retold:
        try:
            async with connection.begin_nested():
                await _enter(connection, run)
        except IntegrityError as error:
            refused[run.record.run_id] = str(error.orig).partition("\n")[0]
    return refused


async def _enter(connection: AsyncConnection, run: RetoldRun) -> None:
    record, run_id = run.record, run.record.run_id
    row = {name: getattr(record, name) for name in _COLUMNS}
    row |= {"warnings": list(record.warnings), "head": run.head}
    await connection.execute(insert(run_table).values(**row))
    for number, fall in enumerate(run.rewinds, 1):
        await connection.execute(insert(rewind_table).values(run_id=run_id, number=number, **vars(fall)))
    for adaptation_id, kernel in run.kernels:
        if adaptation_id is None:
            await kernels.insert_kernel(connection, kernel)
        else:
            await kernels.publish_kernel(connection, kernel, adaptation_id, run_id)
    await branches.enter_past(
        connection,
        run_id,
        heads=run.heads,
        facts=run.facts,
        reports=run.reports,
        decided=run.decisions,
        adaptations=run.adaptations,
        judgements=run.judgements,
    )
    for fact in run.facts:
        if fact.kind is FactKind.QUARANTINE and fact.delivery is not None:
            await markers.quarantine_kernel(connection, fact.delivery.kernel)
    for history in run.histories:
        await decisions.store_history(connection, run_id, history)
    # Under the lease that the row has, which nobody was ever given.
    for drift in run.drifts:
        lease = Lease(run_id=run_id, task_queue="", lease_gen=record.lease_gen)
        await ledger.record_drift(connection, lease, drift.step, drift.fields)


_COLUMNS = (
    *("run_id", "config", "outcome", "created", "lease_gen", "device", "threads", "parameters_start"),
    *("finished", "restarts", "failure", "lineage"),
)
