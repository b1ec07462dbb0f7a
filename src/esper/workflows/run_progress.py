"""Where a run stands, as its workflow knows it: mutable, pure, and carried over continue-as-new as data."""

from esper.contracts.enums import AdaptationState
from esper.contracts.enums import DeliveryMode
from esper.contracts.enums import Outcome
from esper.contracts.messages import RequestAdaptation
from esper.contracts.operational import Adaptation
from esper.contracts.operational import EpochReport
from esper.contracts.operational import KernelDelivery
from esper.contracts.operational import LossPoint
from esper.contracts.operational import MessageTally
from esper.contracts.orders import KnownRun
from esper.contracts.orders import Lease
from esper.contracts.orders import LoadedRun
from esper.contracts.orders import OpenOrder
from esper.contracts.orders import RunStatus
from esper.contracts.orders import TrainingRequest
from esper.contracts.orders import TrainingState
from esper.runtime.remembering import KEPT_LOSSES
from esper.workflows.adaptation_book import AdaptationBook

_KEPT_WORDS = 5
_LONGEST_WORDS = 160


class RunProgress:
    """Position, lease, reports and adaptations of one run."""

    def __init__(self, request: TrainingRequest) -> None:
        state = request.state or TrainingState()
        self.request = request
        self.config = request.config
        self.run_id = request.run_id
        self.lease: Lease | None = state.lease
        self.lease_gen = max(state.lease_gen, state.lease.lease_gen if state.lease is not None else 0)
        """The highest that the run was ever given: a database below it is older than the run."""
        self.loaded: LoadedRun | None = state.loaded
        self.completed_epoch = state.completed_epoch
        self.book = AdaptationBook(state.adaptations, state.deliveries, state.forgotten)
        self.messages = state.messages
        self.report: EpochReport | None = state.report
        self.losses: list[LossPoint] = list(state.losses)
        self.undecided: dict[int, EpochReport] = {}
        self._early: dict[int, EpochReport] = {}
        self.pinned: list[str] = list(state.pinned)
        self.requested: RequestAdaptation | None = state.requested if request.state is not None else request.requested
        self.paused = state.paused
        self.pauses = state.pauses
        self.restarts = state.restarts
        self.decisions = state.decisions
        self.losses_in_a_row = state.losses_in_a_row
        self.open_orders: tuple[OpenOrder, ...] = ()
        self.epochs_in_this_history = 0

    def to_state(self) -> TrainingState:
        """For continue-as-new: nothing is in flight when this is called."""
        return TrainingState(
            lease=self.lease,
            lease_gen=self.lease_gen,
            # The facts are in the book by now; a new owner of the run reads them anew.
            loaded=self.loaded.model_copy(update={"facts": ()}) if self.loaded is not None else None,
            completed_epoch=self.completed_epoch,
            adaptations=self.book.all(),
            forgotten=self.book.forgotten,
            messages=self.messages,
            deliveries=self.book.deliveries(),
            report=self.report,
            losses=tuple(self.losses),
            pinned=tuple(self.pinned),
            requested=self.requested,
            paused=self.paused,
            pauses=self.pauses,
            restarts=self.restarts,
            decisions=self.decisions,
            losses_in_a_row=self.losses_in_a_row,
        )

    def adopt(self, known: KnownRun) -> None:
        """Take over what Urza remembers of a run that goes on after it had ended."""
        reopened = (_reopened(adaptation) for adaptation in known.adaptations)
        self.book = AdaptationBook(reopened, forgotten=known.forgotten)
        self.open_orders = known.open_orders
        self.losses = list(known.losses)[-KEPT_LOSSES:]
        self.decisions = known.decisions
        self.restarts = known.record.restarts
        self.report = known.report
        if known.report is not None and known.report.epoch > known.decided_epoch and self.decides(known.report):
            self.undecided[known.report.epoch] = known.report

    def take_delivery(self, delivery: KernelDelivery) -> Adaptation | None:
        """Take a kernel in, or count what else it is: come before, or for something that is over."""
        repeated = self.book.came_before(delivery)
        taken = self.book.deliver(delivery)
        if taken is not None:
            return taken
        if repeated:
            self.messages = self.messages.model_copy(update={"repeated": self.messages.repeated + 1})
        else:
            self.put_aside(dead=False, what=f"a kernel for {delivery.adaptation.adaptation_id}: {self._why(delivery)}")
        return None

    def _why(self, delivery: KernelDelivery) -> str:
        adaptation = self.book.get(delivery.adaptation.adaptation_id)
        if adaptation is None:
            return "not ordered, or over long ago"
        return "ordered otherwise" if adaptation.state is AdaptationState.ORDERED else f"it is {adaptation.state.value}"

    def put_aside(self, *, dead: bool, what: str) -> None:
        """Count a message that changes nothing and should have: unreadable (`dead`), or for something that is over."""
        tally = self.messages
        self.messages = tally.model_copy(
            update={
                "dead_letters": tally.dead_letters + dead,
                "stale": tally.stale + (not dead),
                "recent": (*tally.recent, what[:_LONGEST_WORDS])[-_KEPT_WORDS:],
            }
        )

    def take_lease(self, lease: Lease, loaded: LoadedRun) -> list[Adaptation]:
        """A trainer has the run in memory; whatever was ordered of its predecessor is void.

        Returns the adaptations of which the recorded facts know more than the book did.
        """
        if self.loaded is not None and loaded.step > self.loaded.step:
            self.losses_in_a_row = 0
        self.lease, self.lease_gen = lease, max(self.lease_gen, lease.lease_gen)
        self.loaded = loaded
        self.completed_epoch = max(self.completed_epoch, self.report.epoch if self.report else 0)
        if loaded.epoch < self.completed_epoch or self.report is None:
            self.completed_epoch = loaded.epoch
        self._early.clear()
        changed = {fact.adaptation_id: self.book.apply(fact) is not None for fact in loaded.facts}
        known = (self.book.get(adaptation_id) for adaptation_id, news in changed.items() if news)
        return [adaptation for adaptation in known if adaptation is not None]

    def complete(self, report: EpochReport) -> list[EpochReport]:
        """Enter a report and give back all that now follow without a gap.

        Two short epochs may reach the server in the wrong order; one that was entered before is dropped.
        """
        if report.epoch > self.completed_epoch:
            self._early[report.epoch] = report
        entered = []
        while (following := self._early.pop(self.completed_epoch + 1, None)) is not None:
            self._enter(following)
            entered.append(following)
        return entered

    def _enter(self, report: EpochReport) -> None:
        self.completed_epoch = report.epoch
        self.report = report
        # After going back to an older head epochs come again.
        self.losses = [point for point in self.losses if point.epoch < report.epoch]
        self.losses.append(
            LossPoint(
                epoch=report.epoch,
                step=report.step,
                train_loss=report.metrics.train_loss,
                val_loss=report.metrics.val_loss,
            )
        )
        del self.losses[:-KEPT_LOSSES]
        self.losses_in_a_row = 0
        self.epochs_in_this_history += 1
        if self.decides(report):
            if self.config.delivery.mode is DeliveryMode.ASAP:
                self.undecided.clear()
            self.undecided[report.epoch] = report

    def decides(self, report: EpochReport) -> bool:
        """Whether a decision follows on this report."""
        if report.stop or report.epoch >= self.config.run.max_epochs:
            return False
        if self.requested is not None:
            return True
        return self.config.tamiyo.policy != "none" and report.epoch % self.config.tamiyo.adaptation_frequency == 0

    def expects_decision(self, epoch: int) -> bool:
        """Whether the trainer should probe at the end of this epoch."""
        if epoch >= self.config.run.max_epochs:
            return False
        if self.requested is not None:
            return True
        return self.config.tamiyo.policy != "none" and epoch % self.config.tamiyo.adaptation_frequency == 0

    def finished(self) -> bool:
        """No further epoch counts."""
        if self.completed_epoch >= self.config.run.max_epochs:
            return True
        return self.report is not None and self.report.stop

    def orderable(self) -> list[int]:
        """The epochs that may run or wait now: the next one and one ahead; in scheduled mode each only when the
        decision that may change it is known."""
        if self.finished():
            return []
        last = min(self.completed_epoch + 2, self.config.run.max_epochs)
        epochs = [epoch for epoch in range(self.completed_epoch + 1, last + 1) if epoch not in self._early]
        if self.config.delivery.mode is DeliveryMode.ASAP:
            return epochs
        lag = self.config.delivery.lag_epochs
        return [epoch for epoch in epochs if all(undecided > epoch - 1 - lag for undecided in self.undecided)]

    def apply_step(self, decided_epoch: int) -> int | None:
        """The start of the epoch `lag_epochs` after the one that runs while a decision is taken."""
        if self.config.delivery.mode is DeliveryMode.ASAP or self.loaded is None:
            return None
        return (decided_epoch + self.config.delivery.lag_epochs) * self.loaded.steps_per_epoch

    def hold_window_steps(self, steps_per_epoch: int) -> int:
        """Steps between a graft and its verdict, before rounding up to the end of an epoch."""
        return max(self.config.tamiyo.hold_epochs * steps_per_epoch, self.config.tamiyo.hold_steps)

    def sites(self) -> tuple[str, ...]:
        """The names of the growth sites, as the trainer found them."""
        graph = self.report.graph if self.report is not None else self.loaded.graph if self.loaded is not None else None
        return () if graph is None else tuple(node.contract.site for node in graph.nodes)

    def status(self, phase: str, outcome: Outcome) -> RunStatus:
        report = self.report
        return RunStatus(
            run_id=self.run_id,
            phase=phase,
            outcome=outcome,
            epoch=self.completed_epoch,
            max_epochs=self.config.run.max_epochs,
            step=report.step if report is not None else 0,
            train_loss=report.metrics.train_loss if report is not None else None,
            val_loss=report.metrics.val_loss if report is not None else None,
            best_val_loss=min((point.val_loss for point in self.losses), default=None),
            parameters=report.parameters if report is not None else self.loaded.parameters if self.loaded else None,
            live_kernels=self.book.live_count(),
            decisions=self.decisions,
            restarts=self.restarts,
            task_queue=self.lease.task_queue if self.lease is not None else None,
            lease_gen=self.lease_gen,
            pinned=tuple(self.pinned),
            messages=self.messages,
        )


def told(messages: MessageTally) -> tuple[str, ...]:
    """The tally as warnings for the run's record: nothing about what had merely come before."""
    warnings = []
    if messages.dead_letters:
        warnings.append(f"{messages.dead_letters} message(s) could not be read and were put aside")
    if messages.stale:
        warnings.append(f"{messages.stale} kernel(s) came for something that was over, and were not used")
    return tuple(warnings)


def _reopened(adaptation: Adaptation) -> Adaptation:
    """A kernel that was delivered to an earlier life of the run is ordered again: its delivery went with it."""
    if adaptation.state is not AdaptationState.DELIVERED:
        return adaptation
    return adaptation.model_copy(update={"state": AdaptationState.ORDERED})
