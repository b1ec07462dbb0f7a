"""The durable life of one run: lease a trainer, keep it busy, let decisions become grafts, end well."""

import asyncio
from datetime import timedelta

from temporalio import workflow
from temporalio.exceptions import ActivityError
from temporalio.exceptions import FailureError
from temporalio.exceptions import is_cancelled_exception

from esper.activities import names
from esper.contracts.enums import Outcome
from esper.contracts.orders import ClaimRequest
from esper.contracts.orders import FinishedRun
from esper.contracts.orders import Lease
from esper.contracts.orders import LoadRequest
from esper.contracts.orders import RecordOutcome
from esper.contracts.orders import RecordRun
from esper.contracts.orders import ReleaseRequest
from esper.contracts.orders import RunRecord
from esper.contracts.orders import TrainingRequest
from esper.runtime.temporal import queues
from esper.runtime.temporal.failures import from_failure
from esper.runtime.temporal.failures import to_failure
from esper.runtime.temporal.options import LOST_TRAINER_LIMIT
from esper.workflows.ordering import order
from esper.workflows.run_desk import RunDesk
from esper.workflows.run_dispatch import Dispatcher
from esper.workflows.task_ring import TrainerLost
from esper.workflows.task_ring import trainer_loss

_CONTINUE = "continue"


@workflow.defn(name="TrainingRun")
class TrainingRun(RunDesk):
    """Workflow id = run id. Messages only write down what was asked; the one loop in `_drive` acts on it."""

    @workflow.init
    def __init__(self, request: TrainingRequest) -> None:
        super().__init__(request)
        self._work = Dispatcher(self)
        self._former_queue: str | None = None

    @workflow.run
    async def run(self, request: TrainingRequest) -> RunRecord:
        try:
            if request.state is None:
                known = await order(
                    names.RECORD_RUN,
                    RecordRun(run_id=request.run_id, config=request.config),
                    task_queue=queues.ORCHESTRATION,
                    summary="record the run",
                )
                self.progress.adopt(known)
            while True:
                try:
                    return await self._live()
                except asyncio.CancelledError:
                    # Cancelling in the Web UI means `stop`: commit, export, release, then end.
                    self.begin_stop()
                except ActivityError as failure:
                    if not is_cancelled_exception(failure):
                        raise
                    self.begin_stop()
        except FailureError as failure:
            return await self._fail(failure)

    async def _live(self) -> RunRecord:
        while True:
            try:
                if self.progress.lease is None:
                    await self._take_trainer()
                ending = await self._drive()
                if ending == _CONTINUE:
                    await workflow.wait_condition(workflow.all_handlers_finished)
                    workflow.continue_as_new(
                        self.progress.request.model_copy(update={"state": self.progress.to_state()})
                    )
                return await self._finish(ending)
            except ActivityError as failure:
                loss = trainer_loss(failure)
                if loss is None:
                    raise
                await self._survive(loss)
            except TrainerLost as loss:
                await self._survive(loss)

    async def _take_trainer(self) -> None:
        progress = self.progress
        self.enter("claiming")
        claim = ClaimRequest(run_id=progress.run_id, urza=progress.config.urza)
        lease = await self._reclaim(claim)
        if lease is None:
            lease = await order(names.CLAIM_TRAINER, claim, task_queue=queues.TRAINER, summary="claim a trainer")
        self.enter("loading")
        loaded = await order(
            names.LOAD_RUN,
            LoadRequest(lease=lease, config=progress.config, code=progress.request.code),
            task_queue=lease.task_queue,
            summary=f"load on {lease.task_queue}",
        )
        progress.take_lease(lease, loaded)
        self._work.renew()
        await self._record_outcome(Outcome.RUNNING)
        self.enter("training")

    async def _reclaim(self, claim: ClaimRequest) -> Lease | None:
        """Ask the process that had the run before: after a server outage it is still there, warm."""
        queue = self._former_queue
        if queue is None:
            return None
        self._former_queue = None
        try:
            return await order(
                names.CLAIM_TRAINER,
                claim.model_copy(update={"preferred_queue": queue}),
                task_queue=queue,
                summary="reclaim the former trainer",
                options="reclaim_trainer",
            )
        except ActivityError as failure:
            if is_cancelled_exception(failure):
                raise
            return None

    async def _survive(self, loss: TrainerLost) -> None:
        """Any failure of pinned work is one loss of the lease: let go of all of it, then claim again."""
        progress = self.progress
        if loss.silent:
            self._work.pinned.forget()
        else:
            await self._work.pinned.cancel()
        self.lost = None
        if progress.lease is not None and not loss.silent:
            self._former_queue = progress.lease.task_queue
        progress.lease = None
        progress.restarts += 1
        progress.losses_in_a_row += 1
        workflow.logger.warning("trainer lost: %s", loss.reason)
        if progress.losses_in_a_row > LOST_TRAINER_LIMIT:
            raise to_failure(
                from_failure(RuntimeError(f"{LOST_TRAINER_LIMIT} trainers were lost in a row; last: {loss.reason}"))
            )

    async def _drive(self) -> str:
        """Dispatch whatever may be dispatched, sleep until something happens, until an ending is reached."""
        while True:
            self._raise_failures()
            await self._enter_pause()
            self._work.dispatch()
            ending = self._ending()
            if ending is not None:
                return ending
            await self.something_happened()

    def _raise_failures(self) -> None:
        if self.lost is not None:
            raise self.lost
        for ring in (self._work.pinned, self._work.control):
            if ring.failure is not None:
                failure, ring.failure = ring.failure, None
                raise trainer_loss(failure) or failure

    def _ending(self) -> str | None:
        progress = self.progress
        if self._work.busy():
            return None
        if self.stopping:
            return Outcome.STOPPED.value
        if progress.paused:
            return None
        if progress.finished() and not progress.undecided:
            return Outcome.COMPLETED.value
        return _CONTINUE if self._work.should_continue() else None

    async def _enter_pause(self) -> None:
        if self.progress.paused and self.outcome is Outcome.RUNNING and not self._work.pinned:
            await self._record_outcome(Outcome.PAUSED)
            self.enter("paused")
        elif not self.progress.paused and self.outcome is Outcome.PAUSED:
            await self._record_outcome(Outcome.RUNNING)
            self.enter("training")

    async def _record_outcome(
        self, outcome: Outcome, finished: FinishedRun | None = None, failure: dict[str, object] | None = None
    ) -> RunRecord:
        progress = self.progress
        record = await order(
            names.RECORD_OUTCOME,
            RecordOutcome(
                run_id=progress.run_id,
                urza=progress.config.urza,
                outcome=outcome,
                loaded=progress.loaded,
                finished=finished,
                restarts=progress.restarts,
                warnings=progress.loaded.warnings if progress.loaded is not None else (),
                failure=failure,  # type: ignore[arg-type]
            ),
            task_queue=queues.ORCHESTRATION,
            summary=f"run {outcome.value}",
        )
        self.outcome = outcome
        return record

    async def _finish(self, ending: str) -> RunRecord:
        progress, outcome = self.progress, Outcome(ending)
        lease = progress.lease
        if lease is None:
            raise TrainerLost("the trainer went before the run could be exported")
        self.enter("finishing")
        finished = await order(
            names.RELEASE_TRAINER,
            ReleaseRequest(lease=lease, finish=True, outcome=outcome),
            task_queue=lease.task_queue,
            summary="evaluate, export, release",
        )
        record = await self._record_outcome(outcome, finished=finished)
        self.enter(outcome.value)
        await workflow.wait_condition(workflow.all_handlers_finished)
        return record

    async def _fail(self, failure: FailureError) -> RunRecord:
        error = from_failure(failure)
        error.run_id = self.progress.run_id
        await self._work.pinned.cancel()
        await self._work.control.cancel()
        lease = self.progress.lease
        if lease is not None:
            try:
                await order(
                    names.RELEASE_TRAINER,
                    ReleaseRequest(lease=lease, finish=False, outcome=Outcome.FAILED),
                    task_queue=lease.task_queue,
                    summary="release",
                )
            except ActivityError as second:
                workflow.logger.warning("the trainer could not be released: %s", second.cause or second)
        await self._record_outcome(Outcome.FAILED, failure=dict(error.to_json()))
        self.enter("failed")
        await workflow.wait_condition(workflow.all_handlers_finished, timeout=timedelta(seconds=10))
        raise to_failure(error) from failure
