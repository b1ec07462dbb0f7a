"""What must stay: every reference that a record of any run still needs, read from the tables.

Kept of a run's heads are the last two on the line of its present head (with all heads of their steps), the head that
each decision other than WAIT was taken on, both heads of a fork point (the parent's and the one that the branch began
with), and where a drift was accepted, since no training leads there from what came before. What lies between two kept
heads can be trained again from the records, which `fork` does. Everything else that a record names is kept while the
record is: kernels and certificates, output files, histories, and the site samples of decisions that may still be built.
"""

import re
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from esper.contracts.assets import ArtifactRef
from esper.contracts.enums import DecisionKind
from esper.contracts.operational import EpochReport
from esper.runtime.urza import ledger
from esper.runtime.urza.ledger import CommittedHead
from esper.runtime.urza.tables import decisions as decision_table
from esper.runtime.urza.tables import facts as fact_table
from esper.runtime.urza.tables import histories as history_table
from esper.runtime.urza.tables import kernels as kernel_table
from esper.runtime.urza.tables import runs as run_table

KEPT_STEPS = 2
"""The newest steps with a head: what `tolaria.live.damage` falls back to."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Needed:
    """`digests` are named by records. `kept` are the checkpoint manifests that stay; what they name stays too, and
    where that is one of `manifests` (the start of a graft on probation is an older head), what that one names."""

    digests: frozenset[str]
    kept: frozenset[str]
    manifests: Mapping[str, ArtifactRef]
    """Every checkpoint manifest of every run, by digest."""
    present: frozenset[str]
    """The present heads: others of `kept` may be gone already, where a run went back behind what had been kept."""


async def needed(connection: AsyncConnection) -> Needed:
    """What must stay, read in one transaction."""
    digests: set[str] = set()
    kept: set[str] = set()
    manifests: dict[str, ArtifactRef] = {}
    columns = run_table.c.run_id, run_table.c.head, run_table.c.finished, run_table.c.lineage
    runs = (await connection.execute(select(*columns))).all()
    for run in runs:
        committed = await ledger.heads(connection, run.run_id)
        manifests |= {item.head.digest: item.manifest for item in committed}
        if run.lineage is not None:
            kept |= {item.head.digest for item in committed if item.head.parent is None} | {run.lineage.head}
        drifted = {drift.step for drift in await ledger.drifts(connection, run.run_id)}
        kept |= {item.head.digest for item in committed if item.head.step in drifted}
        reports, ordered = (
            await ledger.reports(connection, run.run_id, 0),
            await _ordered_epochs(connection, run.run_id),
        )
        kept |= _last_heads(committed, run.head) | {each.head.digest for each in reports if each.epoch in ordered}
        if run.finished is not None:
            digests |= {ref.digest for ref in run.finished.files.values()}
        digests |= _samples(reports, ordered)
    for fact in (await connection.execute(select(fact_table.c.fact))).scalars():
        digests |= set(references_in(fact.model_dump(mode="json")))
    for kernel in (await connection.execute(select(kernel_table.c.kernel))).scalars():
        digests |= set(references_in(kernel.model_dump(mode="json")))
    digests |= set((await connection.execute(select(history_table.c.digest))).scalars())
    kept &= manifests.keys()
    present = frozenset(run.head for run in runs if run.head is not None)
    return Needed(frozenset(digests | kept), frozenset(kept), manifests, present)


def references_in(document: object) -> Iterator[str]:
    """Every digest that a JSON document has as a value anywhere in it."""
    if isinstance(document, str):
        if _DIGEST.fullmatch(document):
            yield document
    elif isinstance(document, dict):
        for value in document.values():
            yield from references_in(value)
    elif isinstance(document, list | tuple):
        for value in document:
            yield from references_in(value)


def _last_heads(committed: Sequence[CommittedHead], current: str | None) -> set[str]:
    """Those to which a run may have to go back. A head that was left as damaged is not on the line any more."""
    line = ledger.line_of(committed, current)
    steps = sorted({item.head.step for item in line}, reverse=True)[:KEPT_STEPS]
    return {item.head.digest for item in line if item.head.step in steps}


async def _ordered_epochs(connection: AsyncConnection, run_id: str) -> set[int]:
    """The epochs after which something other than WAIT was decided."""
    query = select(decision_table.c.decision).where(decision_table.c.run_id == run_id)
    decided = (await connection.execute(query)).scalars()
    return {decision.epoch for decision in decided if decision.kind is not DecisionKind.WAIT}


def _samples(reports: Sequence[EpochReport], ordered: set[int]) -> set[str]:
    """Site samples that a build may still ask for: those of orders, and of epochs that may not be decided on yet."""
    kept = [report for index, report in enumerate(reports) if report.epoch in ordered or index >= len(reports) - 2]
    return {report.site_samples.digest for report in kept if report.site_samples is not None}
