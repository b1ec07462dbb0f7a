"""Workflows that do not do what the real ones do under the same names: a replay must find them out."""

from temporalio import workflow

from esper.contracts.enums import DecisionKind
from esper.contracts.operational import AdaptationDecision
from esper.contracts.orders import DecisionRequest
from esper.contracts.orders import TrainingRequest
from esper.workflows.training_run import TrainingRun


@workflow.defn(name="TamiyoDecision")
class HastyDecision:
    """Decides without asking: not what the history says."""

    @workflow.run
    async def run(self, request: DecisionRequest) -> AdaptationDecision:
        score = request.score
        return AdaptationDecision(
            run_id=score.run_id,
            epoch=score.report.epoch,
            policy="hasty",
            kind=DecisionKind.WAIT,
            code="hold",
            reason="no time",
        )


@workflow.defn(name="TrainingRun")
class RestlessRun(TrainingRun):
    """Sleeps first, as one would who asked a clock."""

    @workflow.init
    def __init__(self, request: TrainingRequest) -> None:
        super().__init__(request)

    @workflow.run
    async def run(self, request: TrainingRequest) -> object:
        await workflow.sleep(1)
        return await super().run(request)
