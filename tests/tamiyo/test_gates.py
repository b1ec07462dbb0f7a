"""Tests of the gates: each reason to WAIT by itself."""

from collections.abc import Callable
from typing import Any

import pytest

from esper.contracts.enums import AdaptationState
from esper.contracts.operational import AdaptationDecision
from esper.contracts.orders import ScoreRequest
from esper.runtime.tamiyo.features import describe
from esper.runtime.tamiyo.policies import get_policy
from esper.runtime.tamiyo.thresholds import threshold

Factory = Callable[..., Any]
NARROW = {
    "layers.2": {
        "saturation": 0.95,
        "residual_gradient": 0.9,
        "residual_gradient_norm": 1.0,
        "gradient_norm": 0.1,
        "gradient_to_weight": 0.01,
    }
}


def decided(request: ScoreRequest) -> AdaptationDecision:
    return get_policy("heuristic").decide(request, describe(request))


def test_nothing_shut_means_grow(make_request: Factory) -> None:
    assert decided(make_request(health=NARROW)).code == "grow"


def test_one_kernel_is_on_its_way_at_a_time(make_request: Factory, make_adaptation: Factory) -> None:
    decision = decided(make_request(health=NARROW, in_flight="run-1/a3"))
    assert decision.code == "busy"
    assert "run-1/a3" in decision.reason
    for state in (AdaptationState.ORDERED, AdaptationState.DELIVERED):
        assert decided(make_request(health=NARROW, adaptations=[make_adaptation(1, state)])).code == "busy"


def test_one_graft_is_held_at_a_time(make_request: Factory, make_adaptation: Factory) -> None:
    assert decided(make_request(health=NARROW, held="run-1/a1")).code == "hold"
    record = [make_adaptation(1, AdaptationState.TRAINING, apply_step=300)]
    decision = decided(make_request(health=NARROW, adaptations=record))
    assert decision.code == "hold"
    assert "until step 1100" in decision.reason
    assert decided(make_request(health=NARROW, adaptations=record, held="run-1/a1")).reason == decision.reason


def test_a_verdict_newer_than_the_report_frees_the_run(make_request: Factory, make_adaptation: Factory) -> None:
    record = [make_adaptation(1, AdaptationState.FOSSILIZED, site="layers.0")]
    assert decided(make_request(health=NARROW, held="run-1/a1", adaptations=record)).code == "grow"


@pytest.mark.parametrize("state", [AdaptationState.FOSSILIZED, AdaptationState.CULLED, AdaptationState.FAILED])
def test_the_budget_counts_whatever_was_ordered(
    make_request: Factory, make_adaptation: Factory, state: AdaptationState
) -> None:
    record = [make_adaptation(number, state, site="layers.0") for number in (1, 2)]
    assert decided(make_request(health=NARROW, adaptations=record, max_adaptations=2)).code == "budget"
    assert decided(make_request(health=NARROW, adaptations=record, max_adaptations=3)).code == "grow"


def test_the_horizon_is_lag_and_hold_to_the_step(make_request: Factory) -> None:
    """Epoch 8 of 30 with 100 steps an epoch: 2,200 steps remain."""
    assert decided(make_request(health=NARROW, hold_window_steps=2100)).code == "grow"
    decision = decided(make_request(health=NARROW, hold_window_steps=2101))
    assert decision.code == "horizon"
    assert "2200 steps remain" in decision.reason
    assert decided(make_request(health=NARROW, hold_window_steps=2100, lag_epochs=2)).code == "horizon"


def test_the_last_part_of_a_run_is_left_alone(make_request: Factory) -> None:
    assert decided(make_request(health=NARROW, epoch=21, hold_window_steps=100)).code == "grow"
    assert decided(make_request(health=NARROW, epoch=22, hold_window_steps=100)).code == "horizon"


def test_a_slope_takes_two_windows(make_request: Factory) -> None:
    """30 epochs: windows of 2."""
    assert decided(make_request(health=NARROW, epoch=3)).code == "warmup"
    assert decided(make_request(health=NARROW, epoch=8, losses=(0.5,) * 3)).code == "warmup"
    assert decided(make_request(health=NARROW, epoch=4)).code == "grow"


def test_growth_waits_while_the_host_learns(make_request: Factory) -> None:
    limit = threshold("learning")
    for drop, code in ((limit + 0.01, "learning"), (limit - 0.01, "grow"), (-0.5, "grow")):
        losses = (1.0,) * 6 + (1.0 - drop,) * 2
        decision = decided(make_request(health=NARROW, losses=losses))
        assert decision.code == code
        assert decision.features["train_improvement"] == pytest.approx(drop)


def test_a_pinned_site_is_never_grown_from_either_side(make_request: Factory) -> None:
    for pinned in ("layers.2", "layers.4"):
        decision = decided(make_request(health=NARROW, pinned=[pinned], blueprints=("widen",)))
        assert decision.code == "below_threshold"
        assert next(a for a in decision.alternatives if a.site == "layers.2").reason == f"{pinned} is pinned"


def test_a_pair_that_did_not_stay_rests(make_request: Factory, make_adaptation: Factory) -> None:
    rest = int(threshold("cooldown_holds") * 100)
    for judged, code in ((801 - rest, "below_threshold"), (800 - rest, "grow")):
        record = [make_adaptation(1, AdaptationState.CULLED, judge_step=judged)]
        request = make_request(health=NARROW, adaptations=record, hold_window_steps=100, blueprints=("widen",))
        assert decided(request).code == code


def test_the_rest_is_counted_from_the_latest_thing_known(make_request: Factory, make_adaptation: Factory) -> None:
    """A vetoed adaptation never had a judge, one that failed not even an apply step: epoch 2 is step 200."""
    applied = [make_adaptation(1, AdaptationState.VETOED, apply_step=700)]
    failed = [make_adaptation(1, AdaptationState.FAILED, apply_step=None)]
    common = {"health": NARROW, "hold_window_steps": 300, "blueprints": ("widen",)}
    assert decided(make_request(adaptations=applied, **common)).code == "below_threshold"
    rested = make_request(adaptations=failed, **common)
    assert decided(rested).code == "grow" if 200 + threshold("cooldown_holds") * 300 <= 800 else "below_threshold"


def test_another_blueprint_or_site_does_not_rest(make_request: Factory, make_adaptation: Factory) -> None:
    for other in ({"blueprint": "bottleneck"}, {"site": "layers.0"}):
        record = [make_adaptation(1, AdaptationState.CULLED, judge_step=799, **other)]
        decision = decided(make_request(health=NARROW, adaptations=record))
        assert (decision.code, decision.blueprint) == ("grow", "widen")


def test_an_overfitting_host_is_not_grown(make_request: Factory) -> None:
    request = make_request(health=NARROW, losses=(0.5,) * 8)
    limit = threshold("overfitting")
    for ratio, code in ((limit + 0.01, "overfitting"), (limit - 0.01, "grow")):
        # A window is two epochs, and only the last of them has another validation loss.
        metrics = request.report.metrics.model_copy(update={"val_loss": 0.5 * (2 * ratio - 1)})
        overfit = request.model_copy(update={"report": request.report.model_copy(update={"metrics": metrics})})
        decision = decided(overfit)
        assert decision.code == code
        assert decision.features["val_to_train"] == pytest.approx(ratio)


def test_the_reason_names_what_would_have_been_chosen(make_request: Factory, make_adaptation: Factory) -> None:
    record = [make_adaptation(1, AdaptationState.CULLED, judge_step=799)]
    decision = decided(make_request(health=NARROW, adaptations=record, blueprints=("widen",)))
    assert decision.code == "below_threshold"
    assert "run-1/a1 was culled here; not again before step 2399" in decision.reason
    health = NARROW | {"layers.0": {"saturation": 0.5}}
    decision = decided(make_request(health=health, adaptations=record, blueprints=("widen",)))
    assert "strongest is widen at layers.0" in decision.reason
    assert "widen at layers.2 would be, but run-1/a1 was culled here" in decision.reason
