"""The front desk of a run: what others may ask of it and what it shows. Handlers only write down."""

from collections.abc import Sequence

from temporalio import workflow
from temporalio.common import RawValue
from temporalio.exceptions import ApplicationError

from esper.contracts.assets import Seed
from esper.contracts.enums import AdaptationState
from esper.contracts.enums import Outcome
from esper.contracts.messages import Answer
from esper.contracts.messages import CullSeed
from esper.contracts.messages import Envelope
from esper.contracts.messages import KernelFailed
from esper.contracts.messages import KernelReady
from esper.contracts.messages import Pause
from esper.contracts.messages import PinSite
from esper.contracts.messages import RequestAdaptation
from esper.contracts.messages import Resume
from esper.contracts.messages import Stop
from esper.contracts.messages import TrainerLost as TrainerLostMessage
from esper.contracts.messages import Veto
from esper.contracts.operational import Adaptation
from esper.contracts.orders import RunStatus
from esper.contracts.orders import TrainingRequest
from esper.workflows import letters
from esper.workflows import presentation
from esper.workflows.run_progress import RunProgress
from esper.workflows.task_ring import TrainerLost

_ENDING = frozenset({"finishing", "completed", "stopped", "failed"})


class RunDesk:
    """Signals, updates and queries of `TrainingRun`, and the notes that its main loop acts on."""

    def __init__(self, request: TrainingRequest) -> None:
        self.progress = RunProgress(request)
        self.phase = "starting" if self.progress.lease is None else "training"
        self.outcome = Outcome.RUNNING
        self.stopping = request.state is not None and request.state.stopping
        self.holder = self.progress.lease
        """The lease that a trainer was given, from its claim on; `progress.lease` is set once it has loaded the run."""
        self.lost: TrainerLost | None = None
        self.abandoned: dict[str, str] = {}
        """Adaptations that a trainer must still be told not to wait for, and why."""
        self.removals: dict[str, Adaptation] = {}
        """What a person culled and a trainer has not yet recorded."""
        self.unrecorded: list[Adaptation] = []
        self._woken = False

    async def something_happened(self) -> None:
        """Sleep until a message came or work ended."""
        await workflow.wait_condition(lambda: self._woken)
        self._woken = False

    def wake(self) -> None:
        self._woken = True

    def enter(self, phase: str) -> None:
        """Begin a phase of the run's life."""
        self.phase = phase
        self.show()
        self.publish()

    def show(self) -> None:
        """Bring the Web UI's current details up to date."""
        workflow.set_current_details(presentation.details(self._status(), self.progress.book.all()))

    def publish(self) -> None:
        """Bring the search attributes up to date."""
        if self.progress.request.search_attributes:
            presentation.upsert_progress(self._status())

    def begin_stop(self) -> None:
        """Commit, export, release, end: by the `stop` update, or by a cancellation in the Web UI."""
        self.stopping = True
        self.progress.pauses += 1
        self.progress.paused = False
        self.wake()

    def note(self, adaptation: Adaptation | None) -> None:
        """Keep a changed adaptation for Urza; `None`: nothing changed."""
        if adaptation is not None:
            self.unrecorded.append(adaptation)
            self.show()
            self.wake()

    def give_up(self, adaptation_id: str, state: AdaptationState, reason: str) -> None:
        """End an adaptation whose kernel no trainer has been given; training does not wait for it any more."""
        adaptation = self.progress.book.get(adaptation_id)
        if adaptation is not None and adaptation.state is AdaptationState.ORDERED:
            self.note(self.progress.book.fail(adaptation_id, state, reason))
            self.abandoned[adaptation_id] = reason

    def expire_orders(self, reason: str) -> None:
        """The run is over: whatever is still on its way has missed it."""
        for adaptation in self.progress.book.all():
            self.note(self.progress.book.fail(adaptation.adaptation_id, AdaptationState.MISSED, reason))

    def _status(self) -> RunStatus:
        return self.progress.status(self.phase, self.outcome)

    @workflow.query(description="where the run stands")
    def status(self) -> RunStatus:
        return self._status()

    @workflow.query(description="every adaptation so far")
    def adaptations(self) -> list[Adaptation]:
        return list(self.progress.book.all())

    @workflow.query(description="every seed, as of the last report")
    def seeds(self) -> list[Seed]:
        report, loaded = self.progress.report, self.progress.loaded
        graph = report.graph if report is not None else loaded.graph if loaded is not None else None
        return [] if graph is None else [seed for node in graph.nodes for seed in node.seeds]

    # --- messages ---------------------------------------------------------------------------------------------

    # Anybody may signal anything. What a handler cannot take would fail its workflow task again and again, so each
    # takes whatever comes and reads it itself.

    @workflow.signal(description="a certified kernel lies in Urza")
    def kernel_ready(self, *sent: object) -> None:
        message = letters.read(Envelope[KernelReady], sent)
        if isinstance(message, str):
            self._put_aside(f"kernel_ready: {message}")
            return
        self.note(self.progress.take_delivery(message.payload.delivery))

    @workflow.signal(description="there will be no kernel for an adaptation")
    def kernel_failed(self, *sent: object) -> None:
        message = letters.read(Envelope[KernelFailed], sent)
        if isinstance(message, str):
            self._put_aside(f"kernel_failed: {message}")
            return
        self.give_up(message.payload.adaptation_id, AdaptationState.FAILED, message.payload.reason)

    @workflow.signal(description="the process that served this queue is dead")
    def trainer_lost(self, *sent: object) -> None:
        message = letters.read(Envelope[TrainerLostMessage], sent)
        if isinstance(message, str):
            self._put_aside(f"trainer_lost: {message}")
        elif self.holder is not None and self.holder.task_queue == message.payload.task_queue:
            self.lost = TrainerLost(message.payload.reason, silent=True)
            self.wake()

    @workflow.signal(dynamic=True, description="anything else: counted, and put aside")
    def unknown_signal(self, name: str, sent: Sequence[RawValue]) -> None:
        self._put_aside(f"{name}: no such signal")

    def _put_aside(self, what: str) -> None:
        self.progress.put_aside(dead=True, what=what)
        workflow.logger.warning("a message was put aside: %s", what)

    def _answer(self, text: str, adaptation_id: str | None = None) -> Answer:
        self.wake()
        return Answer(run_id=self.progress.run_id, message=text, adaptation_id=adaptation_id)

    @workflow.update(description="stop at the next step boundary, commit, wait")
    def pause(self, message: Envelope[Pause]) -> Answer:
        self.progress.paused = True
        self.progress.pauses += 1
        return self._answer("pausing at the next step boundary")

    @pause.validator
    def _may_pause(self, message: Envelope[Pause]) -> None:
        if self.progress.paused:
            raise ValueError("the run is already paused")
        self._not_ending()

    @workflow.update(description="go on")
    def resume(self, message: Envelope[Resume]) -> Answer:
        self.progress.paused = False
        return self._answer("training goes on")

    @resume.validator
    def _may_resume(self, message: Envelope[Resume]) -> None:
        if not self.progress.paused:
            raise ValueError("the run is not paused")

    @workflow.update(description="stop at the next step boundary, keep the checkpoint, end")
    def stop(self, message: Envelope[Stop]) -> Answer:
        self.begin_stop()
        return self._answer("stopping at the next step boundary")

    @stop.validator
    def _may_stop(self, message: Envelope[Stop]) -> None:
        self._not_ending()

    @workflow.update(description="grow here with the next decision")
    def request_adaptation(self, message: Envelope[RequestAdaptation]) -> Answer:
        self.progress.requested = message.payload
        return self._answer(f"{message.payload.blueprint} at {message.payload.site} goes into the next decision")

    @request_adaptation.validator
    def _may_request(self, message: Envelope[RequestAdaptation]) -> None:
        self._not_ending()
        self._known_site(message.payload.site)
        report = self.progress.report
        if message.payload.site in self.progress.pinned:
            raise ValueError(f"{message.payload.site} is pinned")
        if self.progress.requested is not None:
            raise ValueError("another requested adaptation waits for the next decision")
        if report is not None and report.held_adaptation is not None:
            raise ValueError(f"{report.held_adaptation} is on probation: one graft is held at a time")
        pending = self.progress.book.pending()
        if pending is not None:
            raise ValueError(f"{pending.adaptation_id} is on its way: one graft at a time")

    @workflow.update(description="do not graft this adaptation")
    def veto(self, message: Envelope[Veto]) -> Answer:
        adaptation_id = message.payload.adaptation_id
        self.give_up(adaptation_id, AdaptationState.VETOED, f"vetoed by {message.sender}")
        return self._answer(f"{adaptation_id} will not be grafted", adaptation_id)

    @veto.validator
    def _may_veto(self, message: Envelope[Veto]) -> None:
        adaptation = self.progress.book.get(message.payload.adaptation_id)
        if adaptation is None:
            raise ValueError(f"there is no adaptation {message.payload.adaptation_id}")
        if adaptation.state is AdaptationState.DELIVERED:
            raise ValueError(
                f"the kernel of {adaptation.adaptation_id} is with the trainer, which grafts it at a recorded step: "
                f"cull {adaptation.site} after that"
            )
        if adaptation.state is not AdaptationState.ORDERED:
            raise ValueError(f"{adaptation.adaptation_id} is already {adaptation.state.value}")

    @workflow.update(description="never grow this site again")
    def pin_site(self, message: Envelope[PinSite]) -> Answer:
        if message.payload.site not in self.progress.pinned:
            self.progress.pinned.append(message.payload.site)
        return self._answer(f"{message.payload.site} is pinned")

    @pin_site.validator
    def _may_pin(self, message: Envelope[PinSite]) -> None:
        self._known_site(message.payload.site)

    @workflow.update(description="ramp what was grown here to zero, then remove it")
    def cull_seed(self, message: Envelope[CullSeed]) -> Answer:
        adaptation = self._alive_at(message.payload.site)
        self.removals[adaptation.adaptation_id] = adaptation
        return self._answer(f"{adaptation.adaptation_id} ramps to zero", adaptation.adaptation_id)

    @cull_seed.validator
    def _may_cull(self, message: Envelope[CullSeed]) -> None:
        self._not_ending()
        adaptation = self._alive_at(message.payload.site)
        if adaptation.adaptation_id in self.removals:
            raise ValueError(f"{adaptation.adaptation_id} is being removed already")

    def _alive_at(self, site: str) -> Adaptation:
        """What can be culled there. An update handler must fail its update, never its workflow task."""
        adaptation = self.progress.book.live_at(site)
        if adaptation is None:
            raise ApplicationError(f"nothing lives at {site}")
        return adaptation

    def _not_ending(self) -> None:
        if self.stopping or self.phase in _ENDING:
            raise ValueError(f"the run is {'stopping' if self.stopping else self.phase}")

    def _known_site(self, site: str) -> None:
        sites = self.progress.sites()
        if not sites:
            raise ValueError("the model is not loaded yet")
        if site not in sites:
            raise ValueError(f"there is no site {site!r}; sites: {', '.join(sites)}")
