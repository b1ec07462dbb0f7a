"""The orchestrator's own activities: what a run's workflow enters into the library."""

from collections.abc import Callable
from collections.abc import Sequence
from datetime import UTC
from datetime import datetime
from typing import Any

from temporalio import activity

from esper.activities import names
from esper.contracts.enums import AdaptationState
from esper.contracts.operational import Adaptation
from esper.contracts.operational import AdaptationDecision
from esper.contracts.operational import EpochReport
from esper.contracts.operational import Forgotten
from esper.contracts.operational import LossPoint
from esper.contracts.orders import KnownRun
from esper.contracts.orders import OpenOrder
from esper.contracts.orders import RecordAdaptation
from esper.contracts.orders import RecordDecision
from esper.contracts.orders import RecordOutcome
from esper.contracts.orders import RecordRun
from esper.contracts.orders import RunRecord
from esper.runtime.remembering import KEPT_LOSSES
from esper.runtime.remembering import remembered
from esper.runtime.urza.connections import Connections


class UrzaActivities:
    """Async SQL, served by the orchestrator. Every one is safe to run twice."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def all(self) -> list[Callable[..., Any]]:
        return [self.record_run, self.record_decision, self.record_adaptation, self.record_outcome]

    @activity.defn(name=names.RECORD_RUN.name)
    async def record_run(self, request: RecordRun) -> KnownRun:
        """Enter a new run, or find what is known of one that goes on."""
        library = await self._connections.library(request.config.urza)
        record = await library.record_run(request, datetime.now(UTC).isoformat(timespec="seconds"))
        reports = await library.reports(request.run_id)
        decisions = await library.decisions(request.run_id)
        adaptations = await library.adaptations(request.run_id)
        kept, forgotten = remembered(adaptations, Forgotten())
        return KnownRun(
            record=record,
            adaptations=kept,
            forgotten=forgotten,
            losses=tuple(
                LossPoint(
                    epoch=report.epoch,
                    step=report.step,
                    train_loss=report.metrics.train_loss,
                    val_loss=report.metrics.val_loss,
                )
                for report in reports[-KEPT_LOSSES:]
            ),
            report=reports[-1] if reports else None,
            decided_epoch=max((decision.epoch for decision in decisions), default=0),
            decisions=len(decisions),
            open_orders=_open_orders(adaptations, decisions, reports),
        )

    @activity.defn(name=names.RECORD_DECISION.name)
    async def record_decision(self, request: RecordDecision) -> AdaptationDecision:
        """The first decision on an epoch is the decision on that epoch."""
        library = await self._connections.library(request.urza)
        return await library.record_decision(request.decision)

    @activity.defn(name=names.RECORD_ADAPTATION.name)
    async def record_adaptation(self, request: RecordAdaptation) -> RecordAdaptation:
        """Advance one adaptation; gives back what the library holds now."""
        library = await self._connections.library(request.urza)
        recorded = await library.record_adaptation(request.adaptation)
        if request.adaptation.judge is not None:
            await library.record_judgement(request.adaptation.judge)
        return request.model_copy(update={"adaptation": recorded})

    @activity.defn(name=names.RECORD_OUTCOME.name)
    async def record_outcome(self, request: RecordOutcome) -> RunRecord:
        """How the run stands now."""
        library = await self._connections.library(request.urza)
        return await library.finish(request)


def _open_orders(
    adaptations: Sequence[Adaptation], decisions: Sequence[AdaptationDecision], reports: Sequence[EpochReport]
) -> tuple[OpenOrder, ...]:
    """What is neither grafted nor given up, with what was decided and measured for it."""
    decided = {decision.epoch: decision.contract for decision in decisions}
    samples = {report.epoch: report.site_samples for report in reports}
    return tuple(
        OpenOrder(adaptation_id=adaptation.adaptation_id, site=site, site_samples=samples.get(adaptation.epoch))
        for adaptation in adaptations
        if adaptation.state in (AdaptationState.ORDERED, AdaptationState.DELIVERED)
        and (site := decided.get(adaptation.epoch)) is not None
    )
