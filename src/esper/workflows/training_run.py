"""The durable life of one run: lease a trainer, keep it busy, let decisions become grafts, end well."""

import asyncio
from typing import NoReturn
from typing import TypeVar

from temporalio import workflow
from temporalio.exceptions import ActivityError
from temporalio.exceptions import FailureError

from esper.activities import names
from esper.activities.names import ActivityName
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
from esper.errors import RunConflict
from esper.errors import RunFailed
from esper.runtime.temporal import queues
from esper.runtime.temporal.failures import from_failure
from esper.runtime.temporal.failures import to_failure
from esper.runtime.temporal.options import LOST_TRAINER_LIMIT
from esper.runtime.temporal.options import STOP_PATIENCE
from esper.runtime.temporal.options import STUCK
from esper.runtime.temporal.options import longest_silence
from esper.runtime.temporal.workflow_types import TRAINING_RUN
from esper.workflows.ordering import order
from esper.workflows.run_desk import RunDesk
from esper.workflows.run_dispatch import Dispatcher
from esper.workflows.run_progress import told
from esper.workflows.task_ring import TrainerLost
from esper.workflows.task_ring import trainer_loss

ArgumentT = TypeVar("ArgumentT")
ResultT = TypeVar("ResultT")

_CLAIM_AFTER_RESET = "claim-after-reset"
"""Runs that were reset before this patch went on under the lease of the older history."""

_CONTINUE = "continue"
_LONGEST_WAIT_S = 30


@workflow.defn(name=TRAINING_RUN)
class TrainingRun(RunDesk):
    """Workflow id = run id. Messages only write down what was asked; the one loop in `_drive` acts on it."""

    @workflow.init
    def __init__(self, request: TrainingRequest) -> None:
        super().__init__(request)
        self._work = Dispatcher(self)
        self._former_queue: str | None = None
        self._was_reset = False
        # The one sign of a `workflow reset` that a workflow gets.
        workflow.register_random_seed_callback(self._after_reset)

    def _after_reset(self, seed: int) -> None:
        # No call into the SDK is allowed here.
        self._was_reset = True
        self.wake()

    def _notice_reset(self) -> None:
        """Claim anew after a reset: who held the trainer in the older history may be gone, and the server (1.31)
        forgets the time-outs of what was under way there, so that nothing else would ever tell."""
        if self._was_reset:
            self._was_reset = False
            if self.holder is not None and workflow.patched(_CLAIM_AFTER_RESET):
                self.lost = TrainerLost("the workflow was reset", drained=True)

    @workflow.run
    async def run(self, request: TrainingRequest) -> RunRecord:
        life = asyncio.create_task(self._life())
        while True:
            try:
                record = await asyncio.shield(life)
                break
            except asyncio.CancelledError:
                if life.done():
                    raise
                # Cancelling in the Web UI means `stop`: commit, export, release, then end. Nothing that is
                # under way is torn up by it.
                self.begin_stop()
        if record is None:
            # A cancellation of this very moment is not lost either.
            state = self.progress.to_state().model_copy(update={"stopping": self.stopping})
            workflow.continue_as_new(request.model_copy(update={"state": state}))
        return record

    async def _life(self) -> RunRecord | None:
        """The record of the run at its end; `None` when its history is long enough to continue as new."""
        progress = self.progress
        if progress.request.state is None:
            replaces = progress.request.replaces_config
            record = RecordRun(run_id=progress.run_id, config=progress.config, replaces=replaces)
            try:
                known = await order(names.RECORD_RUN, record, task_queue=queues.ORCHESTRATION, summary="record the run")
            except ActivityError as failure:
                # What Urza has under this id, if anything, is not this run: its record is not ours to touch.
                raise to_failure(from_failure(failure)) from failure
            progress.adopt(known)
        try:
            return await self._live()
        except FailureError as failure:
            await self._fail(failure)

    async def _live(self) -> RunRecord | None:
        while True:
            try:
                if self.progress.lease is None and not await self._take_trainer():
                    return await self._end_without_trainer()
                ending = await self._drive()
                if ending == _CONTINUE:
                    await workflow.wait_condition(workflow.all_handlers_finished)
                    return None
                return await self._finish(Outcome(ending))
            except (ActivityError, TrainerLost) as failure:
                loss = trainer_loss(failure)
                if loss is None or (loss.unavailable and self.progress.loaded is None):
                    raise
                await self._survive(loss)

    async def _take_trainer(self) -> bool:
        """Claim a trainer and load the run there. False: the run was stopped, and no trainer came."""
        progress = self.progress
        self.enter("claiming")
        self.holder = await self._claim()
        if self.holder is None:
            return False
        progress.lease_gen = max(progress.lease_gen, self.holder.lease_gen)
        self.enter("loading")
        loaded = await self._ask(
            names.LOAD_RUN,
            LoadRequest(
                lease=self.holder,
                config=progress.config,
                code=progress.request.code,
                accept_drift=progress.request.accept_drift,
            ),
            summary=f"load on {self.holder.task_queue}",
        )
        expected = progress.request.expected_head
        stands_for = (loaded.head.digest, *loaded.rewound_from)
        if progress.loaded is None and expected is not None and expected not in stands_for:
            raise to_failure(
                RunConflict(
                    "ESP-502",
                    f"run {progress.run_id} was to be resumed from head {expected[:19]}, but stands at "
                    f"{loaded.head.digest[:19]}",
                    hint="Something else has trained it in the meantime: look at it, then resume it again",
                    run_id=progress.run_id,
                )
            )
        for adaptation in progress.take_lease(self.holder, loaded):
            self.note(adaptation)
        self._work.renew()
        await self._record_outcome(self.outcome)
        self.enter("paused" if self.outcome is Outcome.PAUSED else "training")
        return True

    async def _claim(self) -> Lease | None:
        """Wait for a trainer; once the run is to stop, no longer than it takes to start one."""
        progress = self.progress
        lost = progress.request.recovers_above
        claim = ClaimRequest(
            run_id=progress.run_id,
            urza=progress.config.urza,
            known_lease_gen=max(progress.lease_gen, lost),
            recovers=progress.lease_gen < lost,
        )
        lease = await self._reclaim(claim)
        if lease is not None:
            return lease
        waiting = asyncio.create_task(
            order(names.CLAIM_TRAINER, claim, task_queue=queues.TRAINER, summary="claim a trainer")
        )
        await workflow.wait_condition(lambda: waiting.done() or self.stopping)
        if not waiting.done():
            # Nothing is lost without a trainer, but only a trainer can export the model.
            patience = 0.0 if progress.loaded is None else STOP_PATIENCE.total_seconds()
            if (await workflow.wait([waiting], timeout=patience))[1]:
                waiting.cancel()
                await workflow.wait([waiting])
                return None if waiting.cancelled() or waiting.exception() is not None else waiting.result()
        return await waiting

    async def _reclaim(self, claim: ClaimRequest) -> Lease | None:
        """Ask the process that had the run before: after a server outage it is still there, warm."""
        queue, self._former_queue = self._former_queue, None
        if queue is None:
            return None
        try:
            return await order(
                names.CLAIM_TRAINER,
                claim.model_copy(update={"preferred_queue": queue}),
                task_queue=queue,
                summary="reclaim the former trainer",
                options="reclaim_trainer",
            )
        except ActivityError:
            return None

    async def _ask(self, activity: ActivityName[ArgumentT, ResultT], argument: ArgumentT, *, summary: str) -> ResultT:
        """Have the trainer do something and wait for it, or for the news that its process is dead."""
        if self.holder is None:
            raise TrainerLost("the trainer went before it could be asked")
        asked = asyncio.create_task(
            order(activity, argument, task_queue=self.holder.task_queue, summary=summary), name=activity.name
        )
        # What becomes of it after that news is of no interest.
        asked.add_done_callback(lambda task: None if task.cancelled() else task.exception())
        await workflow.wait_condition(lambda: asked.done() or self.lost is not None or self._was_reset)
        self._notice_reset()
        if self.lost is not None and not asked.done():
            raise self.lost
        return await asked

    def _cancel_patience(self) -> float:
        return STUCK * longest_silence(self.progress.config).total_seconds()

    async def _survive(self, loss: TrainerLost) -> None:
        """Any failure of pinned work is one loss of the lease: let go of all of it, then claim again."""
        progress = self.progress
        ended = False
        if loss.silent:
            self._work.pinned.forget()
        else:
            ended = await self._work.pinned.cancel(self._cancel_patience())
        if loss.may_live and ended and self.lost is None and self.holder is not None:
            self._former_queue = self.holder.task_queue
        self.holder = progress.lease = self.lost = None
        progress.restarts += 1
        workflow.logger.warning("trainer lost: %s", loss.reason)
        if loss.drained:
            return
        progress.losses_in_a_row += 1
        if progress.losses_in_a_row > LOST_TRAINER_LIMIT:
            raise to_failure(
                RunFailed(
                    "ESP-601",
                    f"{progress.losses_in_a_row} trainers were lost in a row; last: {loss.reason}",
                    hint="see `esper-cli logs RUN`; `resume` goes on from the last checkpoint",
                )
            )
        if loss.unavailable:
            await workflow.sleep(min(2**progress.losses_in_a_row, _LONGEST_WAIT_S))

    async def _drive(self) -> str:
        """Dispatch whatever may be dispatched, sleep until something happens, until an ending is reached."""
        while True:
            self._raise_failures()
            if await self._follow_pause():
                # What came in meanwhile is looked at first.
                continue
            # Nothing may be awaited from here to the ending: what is not under way now is not there.
            self._work.dispatch()
            ending = self._ending()
            if ending is not None:
                return ending
            await self.something_happened()

    def _raise_failures(self) -> None:
        self._notice_reset()
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
        if progress.paused != (self.outcome is Outcome.PAUSED):
            return None
        if not progress.paused and progress.finished():
            return Outcome.COMPLETED.value
        return _CONTINUE if self._work.should_continue() else None

    async def _follow_pause(self) -> bool:
        """Say so when the run has come to rest, and when it goes on. True when there was something to say."""
        if self.stopping:
            return False
        if self.progress.paused and self.outcome is Outcome.RUNNING and self._work.at_rest():
            await self._record_outcome(Outcome.PAUSED)
            self.enter("paused")
            return True
        if not self.progress.paused and self.outcome is Outcome.PAUSED:
            await self._record_outcome(Outcome.RUNNING)
            self.enter("training")
            return True
        return False

    async def _record_outcome(
        self, outcome: Outcome, finished: FinishedRun | None = None, failure: dict[str, object] | None = None
    ) -> RunRecord:
        progress = self.progress
        loaded = progress.loaded
        warnings = () if loaded is None else loaded.warnings
        if outcome not in (Outcome.RUNNING, Outcome.PAUSED):
            warnings += told(progress.messages)
        record = await order(
            names.RECORD_OUTCOME,
            RecordOutcome(
                run_id=progress.run_id,
                urza=progress.config.urza,
                outcome=outcome,
                # Urza has the facts already.
                loaded=None if loaded is None else loaded.model_copy(update={"facts": ()}),
                finished=finished,
                restarts=progress.restarts,
                warnings=warnings,
                failure=failure,  # type: ignore[arg-type]
            ),
            task_queue=queues.ORCHESTRATION,
            summary=f"run {outcome.value}",
        )
        self.outcome = outcome
        return record

    async def _finish(self, outcome: Outcome) -> RunRecord:
        lease = self.progress.lease
        if lease is None:
            raise TrainerLost("the trainer went before the run could be exported")
        self.enter("finishing")
        finished = await self._ask(
            names.RELEASE_TRAINER,
            ReleaseRequest(lease=lease, finish=True, outcome=outcome),
            summary="evaluate, export, release",
        )
        if outcome is Outcome.COMPLETED:
            self.expire_orders("the run ended before its apply step")
        return await self._close(outcome, finished)

    async def _end_without_trainer(self) -> RunRecord:
        """Stopped while no trainer was to be had: the last checkpoint stands, and nothing is exported."""
        workflow.logger.warning("stopped without a trainer: the last checkpoint stands, nothing was exported")
        return await self._close(Outcome.STOPPED, None)

    async def _close(self, outcome: Outcome, finished: FinishedRun | None) -> RunRecord:
        await self._work.record_adaptations()
        record = await self._record_outcome(outcome, finished=finished)
        self.enter(outcome.value)
        await workflow.wait_condition(workflow.all_handlers_finished)
        return record

    async def _fail(self, failure: FailureError) -> NoReturn:
        error = from_failure(failure)
        error.run_id = self.progress.run_id
        for ring in (self._work.pinned, self._work.control):
            await ring.cancel(self._cancel_patience())
        try:
            if self.holder is not None:
                await self._ask(
                    names.RELEASE_TRAINER,
                    ReleaseRequest(lease=self.holder, finish=False, outcome=Outcome.FAILED),
                    summary="release",
                )
        except (ActivityError, TrainerLost) as second:
            workflow.logger.warning("the trainer could not be released: %s", second)
        try:
            await self._work.record_adaptations()
            await self._record_outcome(Outcome.FAILED, failure=dict(error.to_json()))
        except ActivityError as second:
            workflow.logger.warning("the failure could not be recorded: %s", second.cause or second)
        self.enter("failed")
        await workflow.wait_condition(workflow.all_handlers_finished)
        raise to_failure(error) from failure
