"""What makes training safe: heads, facts and reports, written only under the lease that is the run's.

The protocol is that of the architecture, section 7: blobs first, then a manifest, then one conditional
write that moves the head. A fact is recorded before the model is changed by it. First records win.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row
from sqlalchemy import func
from sqlalchemy import select
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection

from esper.contracts.assets import ArtifactRef
from esper.contracts.operational import EpochReport
from esper.contracts.operational import Fact
from esper.contracts.operational import HeadRef
from esper.contracts.orders import Lease
from esper.errors import IntegrityError
from esper.errors import LeaseLost
from esper.runtime.urza.rows import hold
from esper.runtime.urza.rows import insert_new
from esper.runtime.urza.rows import lease_lost
from esper.runtime.urza.rows import no_such_run
from esper.runtime.urza.rows import note_divergence
from esper.runtime.urza.tables import facts as fact_table
from esper.runtime.urza.tables import heads as head_table
from esper.runtime.urza.tables import reports as report_table
from esper.runtime.urza.tables import rewinds as rewind_table
from esper.runtime.urza.tables import runs as run_table

TIMINGS = frozenset({"busy_seconds", "stall_seconds"})
"""What may differ between two trainings of one epoch without their being different."""


@dataclass(frozen=True)
class CommittedHead:
    """A head and where its manifest lies; `lease_gen` is the lease under which it was committed."""

    head: HeadRef
    manifest: ArtifactRef
    lease_gen: int


@dataclass(frozen=True)
class Rewind:
    """A recorded fall back to an older head, because the later one was damaged."""

    from_head: str
    to_head: str
    lease_gen: int
    reason: str


@dataclass(frozen=True)
class RunLedger:
    """What a new owner of a run must know, read under its lease in one transaction."""

    head: HeadRef | None
    manifest: ArtifactRef | None
    facts: tuple[Fact, ...]
    """All facts of the run, by `seq`."""
    reports: tuple[EpochReport, ...]
    """All reports of the run, by epoch."""
    frontier: int
    """The highest step in any fact, report or head: a new apply step lies beyond it."""


async def take_over(connection: AsyncConnection, lease: Lease) -> RunLedger:
    """Check the lease, then read all that its holder must know; `LeaseLost` (ESP-503) if it is stale."""
    row = await hold(connection, lease)
    committed = await heads(connection, lease.run_id)
    current = next((item for item in committed if item.head.digest == row.head), None)
    known_facts = await facts(connection, lease.run_id)
    known_reports = await reports(connection, lease.run_id, 0)
    steps = (
        *(item.head.step for item in committed),
        *(fact.apply_step for fact in known_facts),
        *(report.step for report in known_reports),
    )
    return RunLedger(
        head=current.head if current else None,
        manifest=current.manifest if current else None,
        facts=known_facts,
        reports=known_reports,
        frontier=max(steps, default=0),
    )


async def commit_head(
    connection: AsyncConnection,
    lease: Lease,
    *,
    head: HeadRef,
    manifest: ArtifactRef,
    parent: str | None,
    report: EpochReport | None,
) -> HeadRef:
    """The one conditional write that moves a head; see `Library.commit_head`."""
    _check_commit(lease, head, manifest, parent, report)
    moved = await connection.execute(
        update(run_table)
        .where(
            run_table.c.run_id == lease.run_id,
            run_table.c.lease_gen == lease.lease_gen,
            run_table.c.head.is_not_distinct_from(parent),
        )
        .values(head=head.digest)
    )
    if moved.rowcount == 0 and not await _is_mine_already(connection, lease, head):
        return head
    number = select(func.coalesce(func.max(head_table.c.number), 0) + 1).where(head_table.c.run_id == lease.run_id)
    values = {
        "run_id": lease.run_id,
        "digest": head.digest,
        "number": number.scalar_subquery(),
        "parent": head.parent,
        "step": head.step,
        "epoch": head.epoch,
        "manifest_bytes": manifest.size_bytes,
        "lease_gen": lease.lease_gen,
    }
    await insert_new(connection, head_table, values)
    if report is not None:
        await _insert_report(connection, report)
    return head


def _check_commit(
    lease: Lease, head: HeadRef, manifest: ArtifactRef, parent: str | None, report: EpochReport | None
) -> None:
    if manifest.digest != head.digest:
        raise ValueError(f"the head {head.digest} is not the digest of its manifest {manifest.digest}")
    if head.parent != parent:
        raise ValueError(f"the head's own parent {head.parent} is not the parent {parent} that is to be replaced")
    if report is not None and (report.run_id != lease.run_id or report.head != head):
        raise ValueError("the report is of another run or another head")


async def _is_mine_already(connection: AsyncConnection, lease: Lease, head: HeadRef) -> bool:
    """After a head did not move. True: it stands there under this lease. False: it stood there under this
    lease until the run was claimed anew, so the commit was made, and nothing more may be written. Else raises
    `LeaseLost`: fenced.
    """
    query = select(run_table).where(run_table.c.run_id == lease.run_id).with_for_update()
    row = (await connection.execute(query)).first()
    if row is None:
        raise await no_such_run(connection, lease.run_id)
    if row.lease_gen == lease.lease_gen:
        if row.head == head.digest:
            return True
        raise LeaseLost(
            "ESP-503",
            f"run {lease.run_id}: the head is {row.head}, not the parent of {head.digest}; somebody else moved it",
            hint="Nothing to do: this process stops, and its successor goes on from the last checkpoint",
            run_id=lease.run_id,
        )
    committed = await _committed(connection, lease.run_id, head.digest)
    if row.head == head.digest and committed is not None and committed.lease_gen == lease.lease_gen:
        return False
    raise lease_lost(lease, row.lease_gen, row.task_queue)


async def _insert_report(connection: AsyncConnection, report: EpochReport) -> None:
    values = {"run_id": report.run_id, "epoch": report.epoch, "step": report.step, "report": report}
    if await insert_new(connection, report_table, values):
        return
    of_epoch = report_table.c.run_id == report.run_id, report_table.c.epoch == report.epoch
    first = (await connection.execute(select(report_table.c.report).where(*of_epoch))).scalar_one()
    key = str(report.epoch)
    await note_divergence(connection, report.run_id, "report", key, first, report, ignoring=TIMINGS)


async def rewind(connection: AsyncConnection, lease: Lease, *, damaged: str, to: str, reason: str) -> CommittedHead:
    """Move the head from `damaged` back to the older head `to`, and record it."""
    row = await hold(connection, lease)
    target = await _committed(connection, lease.run_id, to)
    if target is None:
        raise IntegrityError("ESP-407", f"run {lease.run_id} never had the head {to}", run_id=lease.run_id)
    if row.head == to:
        return target
    if row.head != damaged:
        raise LeaseLost("ESP-503", f"run {lease.run_id}: the head is {row.head}, not {damaged}", run_id=lease.run_id)
    await connection.execute(update(run_table).where(run_table.c.run_id == lease.run_id).values(head=to))
    number = select(func.coalesce(func.max(rewind_table.c.number), 0) + 1).where(rewind_table.c.run_id == lease.run_id)
    values = {
        "run_id": lease.run_id,
        "number": number.scalar_subquery(),
        "from_head": damaged,
        "to_head": to,
        "lease_gen": lease.lease_gen,
        "reason": reason,
    }
    await insert_new(connection, rewind_table, values)
    return target


async def rewinds(connection: AsyncConnection, run_id: str) -> tuple[Rewind, ...]:
    """All recorded rewinds of the run, oldest first."""
    query = select(rewind_table).where(rewind_table.c.run_id == run_id).order_by(rewind_table.c.number)
    rows = await connection.execute(query)
    return tuple(Rewind(row.from_head, row.to_head, row.lease_gen, row.reason) for row in rows)


async def heads(connection: AsyncConnection, run_id: str) -> tuple[CommittedHead, ...]:
    """All heads of the run, in the order of their commits."""
    query = select(head_table).where(head_table.c.run_id == run_id).order_by(head_table.c.number)
    return tuple(_head(row) for row in await connection.execute(query))


async def head_at(connection: AsyncConnection, run_id: str, step: int) -> CommittedHead | None:
    """The head at exactly `step` on the line of ancestors of the run's present head."""
    current = (await connection.execute(select(run_table.c.head).where(run_table.c.run_id == run_id))).scalar()
    line = {item.head.digest: item for item in await heads(connection, run_id)}
    while current is not None and current in line:
        item = line[current]
        if item.head.step <= step:
            return item if item.head.step == step else None
        current = item.head.parent
    return None


async def _committed(connection: AsyncConnection, run_id: str, digest: str) -> CommittedHead | None:
    query = select(head_table).where(head_table.c.run_id == run_id, head_table.c.digest == digest)
    row = (await connection.execute(query)).first()
    return None if row is None else _head(row)


def _head(row: Row[Any]) -> CommittedHead:
    return CommittedHead(
        head=HeadRef(digest=row.digest, parent=row.parent, step=row.step, epoch=row.epoch),
        manifest=ArtifactRef(digest=row.digest, size_bytes=row.manifest_bytes),
        lease_gen=row.lease_gen,
    )


async def insert_fact(connection: AsyncConnection, lease: Lease, fact: Fact) -> Fact:
    """Insert by what the fact decides, or find the first; see `Library.insert_fact`."""
    if fact.run_id != lease.run_id:
        raise ValueError(f"a fact of run {fact.run_id} under the lease of run {lease.run_id}")
    await hold(connection, lease)
    decides = fact.decides
    same = (
        fact_table.c.run_id == fact.run_id,
        fact_table.c.adaptation_id == fact.adaptation_id,
        fact_table.c.decides == decides.value,
    )
    existing: Fact | None = (await connection.execute(select(fact_table.c.fact).where(*same))).scalar()
    if existing is not None:
        return existing
    last = select(func.coalesce(func.max(fact_table.c.seq), 0)).where(fact_table.c.run_id == fact.run_id)
    numbered = fact.model_copy(update={"seq": (await connection.execute(last)).scalar_one() + 1})
    values = {
        "run_id": fact.run_id,
        "seq": numbered.seq,
        "adaptation_id": fact.adaptation_id,
        "kind": fact.kind,
        "decides": decides.value,
        "apply_step": fact.apply_step,
        "fact": numbered,
    }
    await connection.execute(fact_table.insert().values(**values))
    return numbered


async def facts(connection: AsyncConnection, run_id: str) -> tuple[Fact, ...]:
    """All facts of the run, by `seq`."""
    query = select(fact_table.c.fact).where(fact_table.c.run_id == run_id).order_by(fact_table.c.seq)
    return tuple((await connection.execute(query)).scalars())


async def reports(connection: AsyncConnection, run_id: str, after_epoch: int) -> tuple[EpochReport, ...]:
    """The reports of the epochs after `after_epoch`, by epoch."""
    after = report_table.c.run_id == run_id, report_table.c.epoch > after_epoch
    query = select(report_table.c.report).where(*after).order_by(report_table.c.epoch)
    return tuple((await connection.execute(query)).scalars())
