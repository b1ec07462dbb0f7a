"""One decision: score the sites on a tamiyo worker, record what was decided, answer."""

from temporalio import workflow
from temporalio.exceptions import ActivityError
from temporalio.exceptions import is_cancelled_exception

from esper.activities import names
from esper.contracts.enums import DecisionKind
from esper.contracts.operational import AdaptationDecision
from esper.contracts.orders import DecisionRequest
from esper.contracts.orders import RecordDecision
from esper.contracts.orders import ScoreRequest
from esper.runtime.temporal import queues
from esper.runtime.temporal.workflow_types import TAMIYO_DECISION
from esper.workflows.ordering import order


@workflow.defn(name=TAMIYO_DECISION)
class TamiyoDecision:
    """Child of a `TrainingRun`, id `<run>/tamiyo/<epoch>`."""

    @workflow.run
    async def run(self, request: DecisionRequest) -> AdaptationDecision:
        epoch = request.score.report.epoch
        try:
            decision = await order(names.SCORE_SITES, request, task_queue=queues.TAMIYO, summary=f"score epoch {epoch}")
            flaw = flaw_of(decision, request.score)
        except ActivityError as failure:
            if is_cancelled_exception(failure):
                raise
            flaw = str(failure.cause or failure)
        if flaw is not None:
            # Training is never failed by the control plane: no strategist means no growth, and says so.
            decision = AdaptationDecision(
                run_id=request.score.run_id,
                epoch=epoch,
                policy=request.score.tamiyo.policy,
                kind=DecisionKind.WAIT,
                code="failed",
                reason=f"no decision could be had: {flaw}",
            )
        recorded = await order(
            names.RECORD_DECISION,
            RecordDecision(urza=request.urza, decision=decision),
            task_queue=queues.ORCHESTRATION,
            summary=f"{decision.kind.value} ({decision.code})",
        )
        workflow.set_current_details(f"**{recorded.kind.value}**: {recorded.reason}")
        return recorded


def flaw_of(decision: AdaptationDecision, request: ScoreRequest) -> str | None:
    """Why this cannot be an answer to that request; `None` when it can."""
    if (decision.run_id, decision.epoch) != (request.run_id, request.report.epoch):
        return f"the policy answered for epoch {decision.epoch} of run {decision.run_id}"
    if decision.kind is not DecisionKind.GERMINATE:
        return None
    if decision.blueprint is None or decision.contract is None or decision.contract.site != decision.site:
        return "the policy orders growth without a blueprint and the contract of its site"
    seeds = {(node.contract.site, seed.index) for node in request.report.graph.nodes for seed in node.seeds}
    if (decision.site, decision.seed) not in seeds:
        return f"the policy orders growth at seed {decision.seed} of {decision.site}, which the model does not have"
    return None
