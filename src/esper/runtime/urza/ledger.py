"""What makes training safe: heads, facts and reports, written only under the lease that is the run's.

The protocol is that of the architecture, section 7: blobs first, then a manifest, then one conditional
write that moves the head. A fact is recorded before the model is changed by it. First records win.
"""

import hashlib
import json
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from pydantic import JsonValue
from sqlalchemy import Row
from sqlalchemy import func
from sqlalchemy import select
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection

from esper.contracts.assets import ArtifactRef
from esper.contracts.enums import FactKind
from esper.contracts.operational import EpochReport
from esper.contracts.operational import Fact
from esper.contracts.operational import HeadRef
from esper.contracts.orders import Lease
from esper.errors import IntegrityError
from esper.errors import LeaseLost
from esper.runtime.failpoints import hit
from esper.runtime.urza import markers
from esper.runtime.urza.rows import hold
from esper.runtime.urza.rows import insert_new
from esper.runtime.urza.rows import lease_lost
from esper.runtime.urza.rows import no_such_run
from esper.runtime.urza.rows import note_divergence
from esper.runtime.urza.tables import divergences as divergence_table
from esper.runtime.urza.tables import facts as fact_table
from esper.runtime.urza.tables import heads as head_table
from esper.runtime.urza.tables import reports as report_table
from esper.runtime.urza.tables import rewinds as rewind_table
from esper.runtime.urza.tables import runs as run_table

DRIFT = "drift"
"""Kind of a divergence: a run that goes on with another configuration, other data or another machine."""

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
class Drift:
    """From `step` on the run went on with what is not as it was: by name, what was and what is."""

    step: int
    fields: Mapping[str, tuple[JsonValue, JsonValue]]


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
    older: tuple[tuple[HeadRef, ArtifactRef], ...] = ()
    """The heads before the present one on its line of parents, newest first, each with its manifest."""
    rewound_from: tuple[str, ...] = ()
    """The damaged heads in whose place the present one is used."""
    crashes: Mapping[str, int] = field(default_factory=dict)
    """By adaptation, how often a process ended during the first execution of its kernel."""
    quarantined: frozenset[str] = frozenset()
    """The digests of the kernels that are never executed again."""


async def take_over(connection: AsyncConnection, lease: Lease) -> RunLedger:
    """Check the lease, then read all that its holder must know; `LeaseLost` (ESP-503) if it is stale."""
    row = await hold(connection, lease)
    committed = await heads(connection, lease.run_id)
    line = line_of(committed, row.head)
    current = line[0] if line else None
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
        older=tuple((item.head, item.manifest) for item in line[1:]),
        rewound_from=_rewound_from(await rewinds(connection, lease.run_id), row.head),
        crashes=await markers.crashes(connection, lease),
        quarantined=await markers.quarantined_kernels(connection),
    )


def line_of(committed: Sequence[CommittedHead], head: str | None) -> tuple[CommittedHead, ...]:
    """The head and its ancestors, newest first."""
    by_digest = {item.head.digest: item for item in committed}
    line: list[CommittedHead] = []
    while head is not None and head in by_digest and by_digest[head] not in line:
        line.append(by_digest[head])
        head = by_digest[head].head.parent
    return tuple(line)


def _rewound_from(recorded: Sequence[Rewind], head: str | None) -> tuple[str, ...]:
    """The heads that the run fell back from to where it stands, also in several falls."""
    reached = [head]
    for rewind_ in reversed(recorded):
        if rewind_.to_head in reached:
            reached.append(rewind_.from_head)
    return tuple(digest for digest in reached[1:] if digest is not None)


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
    hit("commit.in_transaction")
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
    if not await insert_new(connection, head_table, values):
        # The same state was reached before, and left as damaged: its line now is the one that led here.
        mine = head_table.c.run_id == lease.run_id, head_table.c.digest == head.digest
        await connection.execute(update(head_table).where(*mine).values(parent=head.parent))
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


async def record_report(connection: AsyncConnection, lease: Lease, report: EpochReport) -> None:
    """Insert a report without a head of its own; see `Library.record_report`."""
    if report.run_id != lease.run_id:
        raise ValueError(f"a report of run {report.run_id} under the lease of run {lease.run_id}")
    await hold(connection, lease)
    await _insert_report(connection, report)


async def _insert_report(connection: AsyncConnection, report: EpochReport) -> None:
    values = {"run_id": report.run_id, "epoch": report.epoch, "step": report.step, "report": report}
    if await insert_new(connection, report_table, values):
        return
    of_epoch = report_table.c.run_id == report.run_id, report_table.c.epoch == report.epoch
    first = (await connection.execute(select(report_table.c.report).where(*of_epoch))).scalar_one()
    key = str(report.epoch)
    # A report without a head of its own names whichever stood then, which a second training may not repeat.
    borrowed = frozenset({"head"}) if report.head.step != report.step else frozenset()
    await note_divergence(connection, report.run_id, "report", key, first, report, ignoring=TIMINGS | borrowed)


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


async def record_drift(
    connection: AsyncConnection, lease: Lease, step: int, fields: Mapping[str, tuple[JsonValue, JsonValue]]
) -> None:
    """Insert the drift unless it was noted before; see `Library.record_drift`."""
    await hold(connection, lease)
    document: JsonValue = {"step": step, "fields": {name: list(fields[name]) for name in sorted(fields)}}
    text = json.dumps(document, sort_keys=True)
    values = {
        "run_id": lease.run_id,
        "record": DRIFT,
        "key": f"step {step}",
        "digest": f"sha256:{hashlib.sha256(text.encode()).hexdigest()}",
        "second": document,
    }
    await insert_new(connection, divergence_table, values)


async def drifts(connection: AsyncConnection, run_id: str) -> tuple[Drift, ...]:
    """All recorded drifts of the run, by step."""
    mine = divergence_table.c.run_id == run_id, divergence_table.c.record == DRIFT
    documents = (await connection.execute(select(divergence_table.c.second).where(*mine))).scalars()
    found = (
        Drift(document["step"], {name: (was, now) for name, (was, now) in document["fields"].items()})
        for document in documents
    )
    return tuple(sorted(found, key=lambda drift: drift.step))


async def heads(connection: AsyncConnection, run_id: str) -> tuple[CommittedHead, ...]:
    """All heads of the run, in the order of their commits."""
    query = select(head_table).where(head_table.c.run_id == run_id).order_by(head_table.c.number)
    return tuple(_head(row) for row in await connection.execute(query))


async def head_at(connection: AsyncConnection, run_id: str, step: int) -> CommittedHead | None:
    """The head at exactly `step` on the line of ancestors of the run's present head."""
    current = (await connection.execute(select(run_table.c.head).where(run_table.c.run_id == run_id))).scalar()
    line = line_of(await heads(connection, run_id), current)
    return next((item for item in line if item.head.step == step), None)


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
        fact_table.c.decides == decides,
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
        "decides": decides,
        "apply_step": fact.apply_step,
        "fact": numbered,
    }
    await connection.execute(fact_table.insert().values(**values))
    if fact.kind is FactKind.QUARANTINE and fact.delivery is not None:
        await markers.quarantine_kernel(connection, fact.delivery.kernel)
    hit("fact.in_transaction", fact.kind.value)
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
