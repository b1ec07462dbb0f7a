"""What a run has going at once: epochs, deliveries, judges and removals on its trainer; decisions, forges and
records beside them."""

from temporalio import workflow
from temporalio.exceptions import ActivityError
from temporalio.exceptions import ChildWorkflowError
from temporalio.exceptions import WorkflowAlreadyStartedError

from esper.activities import names
from esper.contracts.assets import ArtifactRef
from esper.contracts.assets import SiteContract
from esper.contracts.enums import AdaptationState
from esper.contracts.enums import DecisionKind
from esper.contracts.enums import DeliveryMode
from esper.contracts.enums import FactKind
from esper.contracts.operational import Adaptation
from esper.contracts.operational import AdaptationDecision
from esper.contracts.operational import EpochReport
from esper.contracts.operational import KernelDelivery
from esper.contracts.operational import ScheduledAdaptation
from esper.contracts.orders import AbandonRequest
from esper.contracts.orders import BuildRequest
from esper.contracts.orders import CheckpointRequest
from esper.contracts.orders import DecisionRequest
from esper.contracts.orders import EpochRequest
from esper.contracts.orders import InstallRequest
from esper.contracts.orders import InstallResult
from esper.contracts.orders import JudgeRequest
from esper.contracts.orders import Lease
from esper.contracts.orders import LoadedRun
from esper.contracts.orders import RecordAdaptation
from esper.contracts.orders import RecordDecision
from esper.contracts.orders import RemoveRequest
from esper.contracts.orders import ScoreRequest
from esper.runtime.temporal import queues
from esper.runtime.temporal.failures import from_failure
from esper.runtime.temporal.options import DECISION_ATTEMPTS
from esper.runtime.temporal.options import DECISION_LIMIT
from esper.runtime.temporal.options import INSTALL_ATTEMPTS
from esper.runtime.temporal.options import longest_silence
from esper.runtime.temporal.workflow_types import TAMIYO_DECISION
from esper.runtime.temporal.workflow_types import TEZZERET_COMPILE
from esper.workflows import presentation
from esper.workflows.adaptation_book import scheduled
from esper.workflows.ordering import order
from esper.workflows.run_desk import RunDesk
from esper.workflows.task_ring import TaskRing
from esper.workflows.task_ring import trainer_loss

_AFTER_VERDICT = "decide-after-verdict"
"""Runs from before this patch may decide while a verdict on an older step is still to come."""

_RECORD_UNDECIDED = "record-undecided"
"""Runs from before this patch do not record a decision whose child failed."""


class Dispatcher:
    """Starts whatever the state of the run allows; every piece of work writes its result to the desk."""

    def __init__(self, desk: RunDesk) -> None:
        self._desk = desk
        self.pinned = TaskRing(desk.wake)
        self.control = TaskRing(desk.wake)
        self._held_for_pause = -1
        self._answered: set[str] = set()

    def busy(self) -> bool:
        return bool(self.pinned or self.control)

    def at_rest(self) -> bool:
        """Whether the trainer was told to hold, and has."""
        return not self.pinned and self._held_for_pause == self._desk.progress.pauses

    def renew(self) -> None:
        """A new trainer: what the old one was told counts no more."""
        self._answered.clear()
        self._held_for_pause = -1

    def should_continue(self) -> bool:
        """Whether this history is long enough to continue as new."""
        limit = self._desk.progress.request.continue_after_epochs
        if limit is not None and self._desk.progress.epochs_in_this_history >= limit:
            return True
        return workflow.info().is_continue_as_new_suggested()

    def dispatch(self) -> None:
        progress, lease = self._desk.progress, self._desk.progress.lease
        if lease is None or progress.loaded is None:
            return
        if self._desk.stopping or progress.paused:
            if self._held_for_pause != progress.pauses:
                self._held_for_pause = progress.pauses
                self.pinned.start(f"checkpoint {progress.pauses}", self._hold(lease, progress.pauses))
        else:
            # A twin is trained where the model is: it waits for the end of a pause like an epoch.
            self._order_judge(lease)
            if not self.should_continue():
                self._order_epochs(lease)
        if not self._desk.stopping:
            self._order_removals(lease)
            self._start_decision(progress.loaded)
            self._forge_again()
        self._answer_deliveries(lease)
        if self._desk.unrecorded and "record" not in self.control:
            self.control.start("record", self.record_adaptations())

    def _order_epochs(self, lease: Lease) -> None:
        for epoch in self._desk.progress.orderable():
            if f"epoch {epoch}" not in self.pinned:
                self.pinned.start(f"epoch {epoch}", self._train(lease, epoch))

    async def _train(self, lease: Lease, epoch: int) -> None:
        progress = self._desk.progress
        result = await order(
            names.TRAIN_EPOCH,
            EpochRequest(
                lease=lease,
                epoch=epoch,
                schedule=progress.book.schedule(),
                expects_decision=progress.expects_decision(epoch),
                pauses=progress.pauses,
            ),
            task_queue=lease.task_queue,
            summary=presentation.epoch_summary(epoch, progress.report, progress.book.live_count()),
            silence=longest_silence(progress.config),
        )
        if result.report is not None and lease == progress.lease:
            for report in progress.complete(result.report):
                self._take_report(report)

    def _take_report(self, report: EpochReport) -> None:
        for fact in report.facts:
            self._desk.note(self._desk.progress.book.apply(fact))
        self._desk.show()
        self._desk.publish()

    async def _hold(self, lease: Lease, pauses: int) -> None:
        await order(
            names.CHECKPOINT,
            CheckpointRequest(lease=lease, hold=True, pauses=pauses),
            task_queue=lease.task_queue,
            summary="commit at the next step boundary",
        )

    def _order_judge(self, lease: Lease) -> None:
        report = self._desk.progress.report
        subject = self._desk.progress.book.to_judge(report.step) if report is not None else None
        if subject is not None and f"judge {subject}" not in self.pinned:
            self.pinned.start(f"judge {subject}", self._judge(lease, subject))

    async def _judge(self, lease: Lease, adaptation_id: str) -> None:
        self._desk.enter("judging")
        verdict = await order(
            names.JUDGE_SEED,
            JudgeRequest(lease=lease, adaptation_id=adaptation_id),
            task_queue=lease.task_queue,
            summary=f"judge {adaptation_id}",
            silence=longest_silence(self._desk.progress.config),
        )
        self._desk.note(self._desk.progress.book.judge(verdict))
        self._desk.enter("training")

    def _order_removals(self, lease: Lease) -> None:
        for adaptation in self._desk.removals.values():
            key = f"remove {adaptation.adaptation_id}"
            if key not in self.pinned:
                self.pinned.start(key, self._remove(lease, adaptation))

    async def _remove(self, lease: Lease, adaptation: Adaptation) -> None:
        result = await order(
            names.REMOVE_SEED,
            RemoveRequest(lease=lease, adaptation_id=adaptation.adaptation_id, site=adaptation.site),
            task_queue=lease.task_queue,
            summary=f"cull {adaptation.adaptation_id} at {adaptation.site}",
        )
        self._desk.removals.pop(adaptation.adaptation_id, None)
        if not result.accepted:
            workflow.logger.warning("%s is not removed: %s", adaptation.adaptation_id, result.reason)

    def _answer_deliveries(self, lease: Lease) -> None:
        for delivery in self._desk.progress.book.deliveries():
            subject = delivery.adaptation.adaptation_id
            if subject not in self._answered and subject not in self._desk.abandoned:
                self._answered.add(subject)
                self.pinned.start(f"install {subject}", self._install(lease, delivery))
        for adaptation_id, reason in self._desk.abandoned.items():
            adaptation = self._desk.progress.book.get(adaptation_id)
            key = f"abandon {adaptation_id}"
            if adaptation is not None and key not in self.pinned:
                self.pinned.start(key, self._abandon(lease, scheduled(adaptation), reason))

    async def _install(self, lease: Lease, delivery: KernelDelivery) -> None:
        """Have the trainer record the graft. A kernel that cannot be installed costs its adaptation, never the
        training; what the trainer has recorded rules."""
        adaptation = delivery.adaptation
        for attempt in range(INSTALL_ATTEMPTS):
            try:
                result = await order(
                    names.INSTALL_KERNEL,
                    InstallRequest(lease=lease, delivery=delivery),
                    task_queue=lease.task_queue,
                    summary=f"install {adaptation.blueprint} at {adaptation.site}",
                )
            except ActivityError as failure:
                loss = trainer_loss(failure)
                if loss is not None and not loss.unavailable:
                    raise
                if loss is not None and attempt + 1 < INSTALL_ATTEMPTS:
                    await workflow.sleep(2**attempt)
                    continue
                await self._abandon(lease, adaptation, str(from_failure(failure)))
                return
            state = AdaptationState.STALE if result.fact is None else AdaptationState.MISSED
            if not result.accepted and result.fact is None:
                self._desk.progress.put_aside(dead=False, what=f"{adaptation.adaptation_id}: {result.reason}")
            self._settle(result, state, result.reason)
            return

    async def _abandon(self, lease: Lease, adaptation: ScheduledAdaptation, reason: str) -> None:
        result = await order(
            names.ABANDON_KERNEL,
            AbandonRequest(lease=lease, adaptation=adaptation, reason=reason),
            task_queue=lease.task_queue,
            summary=f"abandon {adaptation.adaptation_id}",
        )
        self._desk.abandoned.pop(adaptation.adaptation_id, None)
        self._settle(result, AdaptationState.FAILED, reason)

    def _settle(self, result: InstallResult, state: AdaptationState, reason: str) -> None:
        """Enter what the trainer says of a delivery: the graft that it recorded, or that there will be none."""
        book = self._desk.progress.book
        if result.fact is not None and result.fact.kind is FactKind.GRAFT:
            self._desk.note(book.accept(result.fact))
        else:
            self._desk.note(book.fail(result.adaptation_id, state, reason))

    def _start_decision(self, loaded: LoadedRun) -> None:
        progress = self._desk.progress
        if progress.undecided and "decide" not in self.control:
            epoch = min(progress.undecided)
            if self._lacks_verdict(progress.undecided[epoch]) and workflow.patched(_AFTER_VERDICT):
                return
            self.control.start("decide", self._decide(progress.undecided[epoch], loaded.steps_per_epoch))

    def _lacks_verdict(self, report: EpochReport) -> bool:
        """Whether the verdict on a graft that ended before this report is still to come: after a reset the reports
        come from the records, faster than it."""
        progress = self._desk.progress
        scheduled_mode = progress.config.delivery.mode is DeliveryMode.SCHEDULED
        return scheduled_mode and progress.book.to_judge(report.step - 1) is not None

    async def _decide(self, report: EpochReport, steps_per_epoch: int) -> None:
        progress, config = self._desk.progress, self._desk.progress.config
        requested, progress.requested = progress.requested, None
        request = DecisionRequest(
            score=ScoreRequest(
                run_id=progress.run_id,
                tamiyo=config.tamiyo,
                max_epochs=config.run.max_epochs,
                steps_per_epoch=steps_per_epoch,
                lag_epochs=config.delivery.lag_epochs,
                hold_window_steps=progress.hold_window_steps(steps_per_epoch),
                report=report,
                history=tuple(point for point in progress.losses if point.epoch < report.epoch),
                adaptations=(
                    progress.book.as_of(report.step)
                    if config.delivery.mode is DeliveryMode.SCHEDULED
                    else progress.book.all()
                ),
                forgotten=progress.book.forgotten,
                pinned=tuple(progress.pinned),
                in_flight=progress.book.in_flight(report, config.delivery.mode),
            ),
            urza=config.urza,
            requested=requested,
        )
        decision = await self._decision_of(request)
        progress.decisions += 1
        progress.undecided.pop(report.epoch, None)
        if decision is not None and decision.kind is DecisionKind.GERMINATE:
            await self._germinate(decision, report)
        self._desk.show()

    async def _decision_of(self, request: DecisionRequest) -> AdaptationDecision | None:
        epoch = request.score.report.epoch
        for attempt in range(DECISION_ATTEMPTS):
            try:
                decision: AdaptationDecision = await workflow.execute_child_workflow(
                    TAMIYO_DECISION,
                    request,
                    id=f"{self._desk.progress.run_id}/tamiyo/{epoch}",
                    task_queue=queues.ORCHESTRATION,
                    result_type=AdaptationDecision,
                    execution_timeout=DECISION_LIMIT,
                    static_summary=f"decide after epoch {epoch}",
                )
                return decision
            except (ChildWorkflowError, WorkflowAlreadyStartedError) as failure:
                # Also when a person cancels or terminates it: training is never failed by the control plane.
                reason = str(failure.cause or failure)
                workflow.logger.warning("no decision on epoch %d: %s", epoch, reason)
                if not workflow.patched(_RECORD_UNDECIDED):
                    return None
                if isinstance(failure, ChildWorkflowError):
                    break
                # That of an earlier life of this run (a reset) has not ended yet.
                await workflow.sleep(2**attempt)
        return await self._record_undecided(epoch, f"no decision could be had: {reason}")

    async def _record_undecided(self, epoch: int, reason: str) -> AdaptationDecision:
        """Nobody decided on this epoch, so nothing grows, and the records say why. What was recorded before rules."""
        progress = self._desk.progress
        decision = AdaptationDecision(
            run_id=progress.run_id,
            epoch=epoch,
            policy=progress.config.tamiyo.policy,
            kind=DecisionKind.WAIT,
            code="failed",
            reason=reason,
        )
        return await order(
            names.RECORD_DECISION,
            RecordDecision(urza=progress.config.urza, decision=decision),
            task_queue=queues.ORCHESTRATION,
            summary=f"wait (failed) after epoch {epoch}",
        )

    async def _germinate(self, decision: AdaptationDecision, report: EpochReport) -> None:
        progress = self._desk.progress
        if decision.contract is None:
            workflow.logger.warning("the decision on epoch %d names no site contract: not ordered", decision.epoch)
            return
        adaptation = progress.book.order(progress.run_id, decision, report, progress.apply_step(decision.epoch))
        if adaptation is None:
            workflow.logger.warning("the decision on epoch %d orders nothing (new)", decision.epoch)
            return
        self._desk.note(adaptation)
        await self._forge(adaptation, decision.contract, report.site_samples)

    def _forge_again(self) -> None:
        """What an earlier life of the run had ordered and never got: its forge told a run that was over."""
        orders, self._desk.progress.open_orders = self._desk.progress.open_orders, ()
        for again in orders:
            adaptation = self._desk.progress.book.get(again.adaptation_id)
            if adaptation is not None and adaptation.state is AdaptationState.ORDERED:
                work = self._forge(adaptation, again.site, again.site_samples)
                self.control.start(f"forge {again.adaptation_id}", work)

    async def _forge(self, adaptation: Adaptation, site: SiteContract, samples: ArtifactRef | None) -> None:
        progress, config = self._desk.progress, self._desk.progress.config
        request = BuildRequest(
            run_id=progress.run_id,
            run_seed=config.run.seed,
            adaptation=scheduled(adaptation),
            site=site,
            site_samples=samples,
            tezzeret=config.tezzeret,
            optimizer=config.optimizer,
            urza=config.urza,
        )
        try:
            await workflow.start_child_workflow(
                TEZZERET_COMPILE,
                request,
                id=f"{progress.run_id}/tezzeret/{adaptation.adaptation_id.rsplit('/', 1)[1]}",
                task_queue=queues.ORCHESTRATION,
                parent_close_policy=workflow.ParentClosePolicy.ABANDON,
                static_summary=presentation.clipped(f"forge {adaptation.blueprint} for {adaptation.site}"),
            )
        except WorkflowAlreadyStartedError:
            # It outlived an earlier life of this run, and will tell this one.
            workflow.logger.info("the forge of %s is at work already", adaptation.adaptation_id)
        except ChildWorkflowError as failure:
            self._desk.give_up(
                adaptation.adaptation_id, AdaptationState.FAILED, f"no forge: {failure.cause or failure}"
            )

    async def record_adaptations(self) -> None:
        """Bring Urza up to date."""
        unrecorded = self._desk.unrecorded
        while unrecorded:
            adaptation = unrecorded[0]
            await order(
                names.RECORD_ADAPTATION,
                RecordAdaptation(
                    run_id=self._desk.progress.run_id, urza=self._desk.progress.config.urza, adaptation=adaptation
                ),
                task_queue=queues.ORCHESTRATION,
                summary=f"{adaptation.adaptation_id} {adaptation.state.value}",
            )
            unrecorded.remove(adaptation)
