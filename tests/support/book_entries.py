"""What the tests of a run's pure part are told, in the world of `fake_activities`: reports, orders, kernels."""

from fake_activities import GRAPH
from fake_activities import REF
from fake_activities import SITE
from fake_activities import STEPS_PER_EPOCH
from fake_activities import FakeWorld
from fake_activities import head
from workflow_stage import configuration

from esper.contracts.enums import DecisionKind
from esper.contracts.operational import Adaptation
from esper.contracts.operational import AdaptationDecision
from esper.contracts.operational import EpochReport
from esper.contracts.operational import Fact
from esper.contracts.operational import KernelDelivery
from esper.contracts.orders import EpochRequest
from esper.contracts.orders import Lease
from esper.contracts.orders import LoadedRun
from esper.contracts.orders import TrainingRequest
from esper.contracts.orders import TrainingState
from esper.workflows.adaptation_book import scheduled
from esper.workflows.run_progress import RunProgress

LEASE = Lease(run_id="r", task_queue="q", lease_gen=1)


def report(epoch: int, **changes: object) -> EpochReport:
    return FakeWorld()._report(EpochRequest(lease=LEASE, epoch=epoch), ()).model_copy(update=changes)


def growth(epoch: int = 1, *, run_id: str = "r", **changes: object) -> AdaptationDecision:
    """A decision that orders a graft at the fake world's only site."""
    decision = AdaptationDecision(
        run_id=run_id,
        epoch=epoch,
        policy="fake",
        kind=DecisionKind.GERMINATE,
        code="grow",
        reason="because",
        site=SITE.site,
        seed=0,
        blueprint="bottleneck",
        contract=SITE,
    )
    return decision.model_copy(update=changes)


def kernel_for(adaptation: Adaptation) -> KernelDelivery:
    return KernelDelivery(
        delivery_id=REF.digest,
        adaptation=scheduled(adaptation),
        kernel=REF.digest,
        manifest=REF,
        weights=REF,
        certificate=REF,
    )


def loaded(epoch: int = 0, facts: tuple[Fact, ...] = ()) -> LoadedRun:
    step = epoch * STEPS_PER_EPOCH
    return LoadedRun(
        step=step,
        epoch=epoch,
        steps_per_epoch=STEPS_PER_EPOCH,
        head=head(step),
        device="cpu",
        threads=1,
        parameters=100,
        model_name="Fake",
        graph=GRAPH,
        facts=facts,
    )


def progress(epochs: int = 20, state: TrainingState | None = None, **sections: dict[str, object]) -> RunProgress:
    """A run that has been loaded, or, with `state`, one that is continued in another execution."""
    begun = RunProgress(TrainingRequest(run_id="r", config=configuration(epochs, **sections), state=state))
    if state is None:
        begun.take_lease(LEASE, loaded())
    return begun
