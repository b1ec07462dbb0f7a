"""Workflows that do not do what the real ones do under the same names: a replay must find them out."""

import uuid
from datetime import timedelta

from temporalio import workflow

from esper.activities import names
from esper.contracts.enums import DecisionKind
from esper.contracts.operational import AdaptationDecision
from esper.contracts.operational import KernelDelivery
from esper.contracts.orders import BuildRequest
from esper.contracts.orders import DecisionRequest
from esper.contracts.orders import RecordDecision
from esper.contracts.orders import TrainingRequest
from esper.runtime.temporal import queues
from esper.workflows.ordering import order
from esper.workflows.run_dispatch import Dispatcher
from esper.workflows.training_run import TrainingRun


@workflow.defn(name="TamiyoDecision")
class HastyDecision:
    """Decides without asking: not what the history says."""

    @workflow.run
    async def run(self, request: DecisionRequest) -> AdaptationDecision:
        return hasty(request)


def hasty(request: DecisionRequest) -> AdaptationDecision:
    score = request.score
    return AdaptationDecision(
        run_id=score.run_id,
        epoch=score.report.epoch,
        policy="hasty",
        kind=DecisionKind.WAIT,
        code="hold",
        reason="no time",
    )


@workflow.defn(name="TamiyoDecision")
class BackwardDecision:
    """Records before it asks: the same activities in another order."""

    @workflow.run
    async def run(self, request: DecisionRequest) -> AdaptationDecision:
        record = RecordDecision(urza=request.urza, decision=hasty(request))
        await order(names.RECORD_DECISION, record, task_queue=queues.ORCHESTRATION, summary="record")
        return await order(names.SCORE_SITES, request, task_queue=queues.TAMIYO, summary="score")


@workflow.defn(name="TezzeretCompile")
class OtherForge:
    """Orders another activity than the one that was there."""

    @workflow.run
    async def run(self, request: BuildRequest) -> KernelDelivery | None:
        await workflow.execute_activity(
            "build_anything", request, task_queue=queues.FORGE, start_to_close_timeout=timedelta(seconds=1)
        )
        return None


class _DicingDispatcher(Dispatcher):
    async def _decision_of(self, request: DecisionRequest) -> AdaptationDecision | None:
        with workflow.unsafe.sandbox_unrestricted():
            name = uuid.uuid4().hex
        await workflow.execute_child_workflow("TamiyoDecision", request, id=f"{self._desk.progress.run_id}/{name}")
        return None


@workflow.defn(name="TrainingRun")
class DicingRun(TrainingRun):
    """Names its decisions at random."""

    @workflow.init
    def __init__(self, request: TrainingRequest) -> None:
        super().__init__(request)
        self._work = _DicingDispatcher(self)

    @workflow.run
    async def run(self, request: TrainingRequest) -> object:
        return await super().run(request)


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
