"""Urza's face: one async method for each thing that is recorded or read, each one transaction.

Every write is safe twice: it inserts or finds what stands there, or moves a state that it names. Methods
that train take the `Lease` and raise `LeaseLost` (ESP-503) once another process was given a newer one. All
raise `DatabaseUnavailable` (ESP-333) when the database does not do its work, and `NotFoundError` (ESP-505)
for an unknown run where they need one. Times are given by the caller and are informative only.
"""

from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import JsonValue
from sqlalchemy.ext.asyncio import AsyncEngine

from esper.contracts.assets import ArtifactRef
from esper.contracts.assets import Blueprint
from esper.contracts.assets import Kernel
from esper.contracts.enums import KernelState
from esper.contracts.enums import Outcome
from esper.contracts.operational import Adaptation
from esper.contracts.operational import AdaptationDecision
from esper.contracts.operational import EpochReport
from esper.contracts.operational import Fact
from esper.contracts.operational import HeadRef
from esper.contracts.operational import JudgeReport
from esper.contracts.orders import Lease
from esper.contracts.orders import RecordOutcome
from esper.contracts.orders import RecordRun
from esper.contracts.orders import RunRecord
from esper.runtime.failpoints import hit
from esper.runtime.urza import branches
from esper.runtime.urza import decisions
from esper.runtime.urza import kernels
from esper.runtime.urza import ledger
from esper.runtime.urza import markers
from esper.runtime.urza import retention
from esper.runtime.urza import retold
from esper.runtime.urza import runs
from esper.runtime.urza.branches import Branch
from esper.runtime.urza.decisions import StoredHistory
from esper.runtime.urza.engine import describe
from esper.runtime.urza.engine import make_engine
from esper.runtime.urza.engine import parse_url
from esper.runtime.urza.engine import reading
from esper.runtime.urza.engine import writing
from esper.runtime.urza.ledger import CommittedHead
from esper.runtime.urza.ledger import Drift
from esper.runtime.urza.ledger import Rewind
from esper.runtime.urza.ledger import RunLedger
from esper.runtime.urza.migration import require_current
from esper.runtime.urza.retention import Needed
from esper.runtime.urza.retold import RetoldRun


class Library:
    """The SQL half of Urza. Belongs to the event loop that opened it; one a process.

    ```python
    async with await Library.open("default", default_file=home / "urza.db") as library:
        await library.runs(limit=20)
    ```
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    @classmethod
    async def open(cls, url: str, *, default_file: Path) -> Self:
        """Connect and check the revision; never creates or migrates. Raises `DatabaseUnavailable` (ESP-331..334)."""
        engine = make_engine(parse_url(url, default_file))
        try:
            await require_current(engine)
        except BaseException:
            await engine.dispose()
            raise
        return cls(engine)

    async def close(self) -> None:
        await self._engine.dispose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def describe(self) -> str:
        """The database's URL without its password."""
        return describe(self._engine.url)

    # Runs

    async def record_run(self, request: RecordRun, now: str) -> RunRecord:
        """Insert the run as RUNNING, or find it; `RunConflict` (ESP-501) if it has another configuration."""
        async with writing(self._engine) as connection:
            return await runs.record_run(connection, request, now)

    async def enter_branch(self, branch: Branch, now: str) -> None:
        """A run with the past of another; `RunConflict` (ESP-501) when its id is taken."""
        async with writing(self._engine) as connection:
            await branches.enter_branch(connection, branch, now)

    async def require_empty(self) -> None:
        """Raises `RunConflict` (ESP-504) when there is any run."""
        async with reading(self._engine) as connection:
            await retold.require_empty(connection, self.describe())

    async def enter_retold(self, runs: Sequence[RetoldRun]) -> Mapping[str, str]:
        """Runs that were told again after the database was lost, all in one transaction; those that the database
        refuses by id, each with why. `RunConflict` (ESP-504) when it has any run."""
        async with writing(self._engine) as connection:
            return await retold.enter_retold(connection, runs, self.describe())

    async def run(self, run_id: str) -> RunRecord:
        """One run; `NotFoundError` (ESP-505) names near run ids."""
        async with reading(self._engine) as connection:
            return await runs.run(connection, run_id)

    async def runs(self, limit: int = 100) -> tuple[RunRecord, ...]:
        """The newest runs, newest first."""
        async with reading(self._engine) as connection:
            return await runs.runs(connection, limit)

    async def set_outcome(self, run_id: str, outcome: Outcome) -> RunRecord:
        """Move the run to `outcome` if `runs.OUTCOMES` allows it, else `RunConflict` (ESP-504)."""
        async with writing(self._engine) as connection:
            return await runs.set_outcome(connection, run_id, outcome)

    async def finish(self, request: RecordOutcome) -> RunRecord:
        """As `set_outcome`, with what is known besides: device and size, end result, restarts, warnings, failure."""
        async with writing(self._engine) as connection:
            return await runs.finish(connection, request)

    # Leases

    async def claim(self, run_id: str, task_queue: str, *, known: int = 0, recovers: bool = False) -> Lease:
        """A new lease; every earlier one of the run is stale from now on.

        `known` is the highest that the run's workflow was ever given. A database below it was restored from an older
        copy: `RunConflict` (ESP-502), unless the claim `recovers` the run; then the new lease lies above `known`.
        """
        hit("lease.before_claim")
        async with writing(self._engine) as connection:
            lease = await runs.claim(connection, run_id, task_queue, known=known, recovers=recovers)
        hit("lease.after_claim")
        return lease

    async def release(self, lease: Lease) -> bool:
        """Give the lease back; False when it was stale already."""
        hit("lease.before_release")
        async with writing(self._engine) as connection:
            released = await runs.release(connection, lease)
        hit("lease.after_release")
        return released

    async def lease(self, run_id: str) -> Lease | None:
        """The lease that is held now; `None` when it was released or never taken."""
        async with reading(self._engine) as connection:
            return await runs.lease(connection, run_id)

    # Heads, facts, reports

    async def take_over(self, lease: Lease) -> RunLedger:
        """Head, facts and reports, read in the transaction that checks the lease."""
        hit("lease.before_take_over")
        async with writing(self._engine) as connection:
            known = await ledger.take_over(connection, lease)
        hit("lease.after_take_over")
        return known

    async def open_marker(self, lease: Lease, adaptation_id: str, kernel: str) -> None:
        """Before a kernel is executed for the first time. A process that ends now is counted by `take_over`."""
        async with writing(self._engine) as connection:
            await markers.open_marker(connection, lease, adaptation_id, kernel)

    async def close_marker(self, lease: Lease, adaptation_id: str) -> None:
        """After it: the process has survived."""
        async with writing(self._engine) as connection:
            await markers.close_marker(connection, lease, adaptation_id)

    async def commit_head(
        self,
        lease: Lease,
        *,
        head: HeadRef,
        manifest: ArtifactRef,
        parent: str | None,
        report: EpochReport | None = None,
    ) -> HeadRef:
        """Move the run's head from `parent` to `head`, with the report of the epoch that ends there, if one does.

        `manifest` is the stored checkpoint manifest, whose digest is the head's. The first report of an epoch
        stands; one that differs in more than timings counts as a divergence. `LeaseLost`: fenced, stop.
        """
        async with writing(self._engine) as connection:
            return await ledger.commit_head(
                connection, lease, head=head, manifest=manifest, parent=parent, report=report
            )

    async def record_report(self, lease: Lease, report: EpochReport) -> None:
        """The report of an epoch that ended without a head of its own; it names the newest one before. The first
        report of an epoch stands."""
        async with writing(self._engine) as connection:
            await ledger.record_report(connection, lease, report)

    async def heads(self, run_id: str) -> tuple[CommittedHead, ...]:
        """All heads that the run ever had, in the order of their commits."""
        async with reading(self._engine) as connection:
            return await ledger.heads(connection, run_id)

    async def head_at(self, run_id: str, step: int) -> CommittedHead | None:
        """The head at exactly `step`, among the ancestors of the present head and itself."""
        async with reading(self._engine) as connection:
            return await ledger.head_at(connection, run_id, step)

    async def rewind(self, lease: Lease, *, damaged: str, to: str, reason: str) -> CommittedHead:
        """Fall back, on record, from the `damaged` head to the older head `to` (digests)."""
        async with writing(self._engine) as connection:
            return await ledger.rewind(connection, lease, damaged=damaged, to=to, reason=reason)

    async def rewinds(self, run_id: str) -> tuple[Rewind, ...]:
        async with reading(self._engine) as connection:
            return await ledger.rewinds(connection, run_id)

    async def record_drift(self, lease: Lease, step: int, fields: Mapping[str, tuple[JsonValue, JsonValue]]) -> None:
        """Note that the run goes on at `step` with what is not as it was (by name, what was and what is): a
        divergence of kind ``drift``, once however often it is noted."""
        async with writing(self._engine) as connection:
            await ledger.record_drift(connection, lease, step, fields)

    async def drifts(self, run_id: str) -> tuple[Drift, ...]:
        """All recorded drifts of the run, by step."""
        async with reading(self._engine) as connection:
            return await ledger.drifts(connection, run_id)

    async def insert_fact(self, lease: Lease, fact: Fact) -> Fact:
        """The fact that now rules (run, adaptation, kind): this one with its `seq`, or the one recorded before.

        A graft and a missed delivery of one adaptation exclude each other: whichever came first is returned.
        """
        async with writing(self._engine) as connection:
            return await ledger.insert_fact(connection, lease, fact)

    async def facts(self, run_id: str) -> tuple[Fact, ...]:
        """All facts of the run, by `seq`."""
        async with reading(self._engine) as connection:
            return await ledger.facts(connection, run_id)

    async def reports(self, run_id: str, after_epoch: int = 0) -> tuple[EpochReport, ...]:
        """The reports of the epochs after `after_epoch`, by epoch."""
        async with reading(self._engine) as connection:
            return await ledger.reports(connection, run_id, after_epoch)

    async def needed(self) -> Needed:
        """What garbage collection must leave alone, for all runs at one moment."""
        async with reading(self._engine) as connection:
            return await retention.needed(connection)

    # Decisions, adaptations, judgements, histories

    async def record_decision(self, decision: AdaptationDecision) -> AdaptationDecision:
        """The decision that stands for (run, epoch): the first; one that differs counts as a divergence."""
        async with writing(self._engine) as connection:
            return await decisions.record_decision(connection, decision)

    async def decisions(self, run_id: str) -> tuple[AdaptationDecision, ...]:
        """All decisions of the run, by epoch."""
        async with reading(self._engine) as connection:
            return await decisions.decisions(connection, run_id)

    async def record_adaptation(self, adaptation: Adaptation) -> Adaptation:
        """Insert or advance, by `decisions.ADAPTATION_MOVES`; what may not follow changes nothing.

        Returns what stands. The first terminal state wins; a known kernel, apply step or judgement is never lost.
        """
        async with writing(self._engine) as connection:
            return await decisions.record_adaptation(connection, adaptation)

    async def adaptations(self, run_id: str) -> tuple[Adaptation, ...]:
        """All adaptations of the run, by number."""
        async with reading(self._engine) as connection:
            return await decisions.adaptations(connection, run_id)

    async def record_judgement(self, report: JudgeReport) -> JudgeReport:
        """The judgement that stands for the adaptation: the first; one that differs counts as a divergence."""
        async with writing(self._engine) as connection:
            return await decisions.record_judgement(connection, report)

    async def judgements(self, run_id: str) -> tuple[JudgeReport, ...]:
        """All judgements of the run, by step."""
        async with reading(self._engine) as connection:
            return await decisions.judgements(connection, run_id)

    async def store_history(
        self,
        run_id: str,
        workflow_id: str,
        temporal_run_id: str,
        events_json_ref: ArtifactRef,
        sequence: int,
    ) -> StoredHistory:
        """Note where the history of one workflow execution lies; a later reading takes the earlier one's place."""
        history = StoredHistory(workflow_id, temporal_run_id, sequence, events_json_ref)
        async with writing(self._engine) as connection:
            return await decisions.store_history(connection, run_id, history)

    async def histories(self, run_id: str) -> tuple[StoredHistory, ...]:
        """All stored histories of the run, by `sequence`."""
        async with reading(self._engine) as connection:
            return await decisions.histories(connection, run_id)

    # Blueprints, kernels

    async def submit_blueprint(self, blueprint: Blueprint) -> Blueprint:
        """Insert, or find the same; `ConflictError` (ESP-504) if that name and version has other content."""
        async with writing(self._engine) as connection:
            return await kernels.submit_blueprint(connection, blueprint)

    async def blueprints(self) -> tuple[Blueprint, ...]:
        """All submitted blueprints, by name and version."""
        async with reading(self._engine) as connection:
            return await kernels.list_blueprints(connection)

    async def blueprint(self, name: str, version: int | None = None) -> Blueprint:
        """One blueprint, the newest version unless one is given; `BlueprintError` (ESP-410) names near ones."""
        async with reading(self._engine) as connection:
            return await kernels.get_blueprint(connection, name, version)

    async def publish_kernel(self, kernel: Kernel, adaptation_id: str, run_id: str) -> Kernel:
        """The kernel of the adaptation: this one, or the one published for it before. One row a digest."""
        async with writing(self._engine) as connection:
            return await kernels.publish_kernel(connection, kernel, adaptation_id, run_id)

    async def kernel(self, digest: str) -> Kernel:
        """One kernel in its present state; `NotFoundError` (ESP-430)."""
        async with reading(self._engine) as connection:
            return await kernels.kernel(connection, digest)

    async def kernels(self, limit: int = 100) -> tuple[Kernel, ...]:
        """The newest kernels, newest first."""
        async with reading(self._engine) as connection:
            return await kernels.kernels(connection, limit)

    async def set_kernel_state(self, digest: str, old: KernelState, new: KernelState) -> Kernel:
        """Move the kernel from `old` to `new`; `ConflictError` (ESP-504) if it is in neither."""
        async with writing(self._engine) as connection:
            return await kernels.set_kernel_state(connection, digest, old, new)
