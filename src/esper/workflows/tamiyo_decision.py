"""One decision: score the sites on a tamiyo worker, record what was decided, answer."""

from temporalio import workflow
from temporalio.exceptions import ActivityError
from temporalio.exceptions import is_cancelled_exception

from esper.activities import names
from esper.contracts.enums import DecisionKind
from esper.contracts.operational import AdaptationDecision
from esper.contracts.orders import DecisionRequest
from esper.contracts.orders import RecordDecision
from esper.runtime.temporal import queues
from esper.workflows.ordering import order


@workflow.defn(name="TamiyoDecision")
class TamiyoDecision:
    """Child of a `TrainingRun`, id `<run>/tamiyo/<epoch>`."""

    @workflow.run
    async def run(self, request: DecisionRequest) -> AdaptationDecision:
        epoch = request.score.report.epoch
        try:
            decision = await order(names.SCORE_SITES, request, task_queue=queues.TAMIYO, summary=f"score epoch {epoch}")
        except ActivityError as failure:
            if is_cancelled_exception(failure):
                raise
            # Training is never failed by the control plane: no strategist means no growth, and says so.
            decision = AdaptationDecision(
                run_id=request.score.run_id,
                epoch=epoch,
                policy=request.score.tamiyo.policy,
                kind=DecisionKind.WAIT,
                code="failed",
                reason=f"no decision could be had: {failure.cause or failure}",
            )
        recorded = await order(
            names.RECORD_DECISION,
            RecordDecision(urza=request.urza, decision=decision),
            task_queue=queues.ORCHESTRATION,
            summary=f"{decision.kind.value} ({decision.code})",
        )
        workflow.set_current_details(f"**{recorded.kind.value}**: {recorded.reason}")
        return recorded
