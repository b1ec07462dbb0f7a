"""Scoring as a worker does it: in a thread, from a request alone."""

from fake_activities import STEPS_PER_EPOCH
from fake_activities import FakeWorld
from temporalio.testing import ActivityEnvironment
from workflow_stage import configuration

from esper.activities.tamiyo import score_sites
from esper.contracts.enums import DecisionKind
from esper.contracts.messages import RequestAdaptation
from esper.contracts.orders import DecisionRequest
from esper.contracts.orders import EpochRequest
from esper.contracts.orders import Lease
from esper.contracts.orders import ScoreRequest


def request(*, requested: RequestAdaptation | None = None) -> DecisionRequest:
    config = configuration(100)
    lease = Lease(run_id="r1", task_queue="q", lease_gen=1)
    return DecisionRequest(
        score=ScoreRequest(
            run_id="r1",
            tamiyo=config.tamiyo,
            max_epochs=100,
            steps_per_epoch=STEPS_PER_EPOCH,
            lag_epochs=1,
            hold_window_steps=20,
            report=FakeWorld()._report(EpochRequest(lease=lease, epoch=3), ()),
        ),
        urza=config.urza,
        requested=requested,
    )


def test_without_evidence_the_answer_is_to_wait_and_says_why() -> None:
    decision = ActivityEnvironment().run(score_sites, request())
    assert (decision.kind, decision.epoch, decision.run_id) == (DecisionKind.WAIT, 3, "r1")
    assert decision.reason


def test_the_same_request_has_the_same_answer() -> None:
    environment = ActivityEnvironment()
    assert environment.run(score_sites, request()) == environment.run(score_sites, request())


def test_a_persons_request_takes_the_place_of_the_policys_choice() -> None:
    wish = RequestAdaptation(site="layers.0", blueprint="bottleneck", hyperparameters={"rank": 2})
    decision = ActivityEnvironment().run(score_sites, request(requested=wish))
    assert (decision.kind, decision.site, decision.blueprint) == (DecisionKind.GERMINATE, "layers.0", "bottleneck")
    assert decision.contract is not None
    assert decision.hyperparameters["rank"] == 2
