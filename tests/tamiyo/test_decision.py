"""Tests of one decision as a workflow orders it: the policy's, or a person's request."""

from collections.abc import Callable
from typing import Any

import pytest

from esper.contracts.config import UrzaConfig
from esper.contracts.enums import AdaptationState
from esper.contracts.enums import DecisionKind
from esper.contracts.enums import SeedState
from esper.contracts.messages import RequestAdaptation
from esper.contracts.operational import AdaptationDecision
from esper.contracts.orders import DecisionRequest
from esper.contracts.orders import ScoreRequest
from esper.errors import ConfigurationError
from esper.runtime.tamiyo.decision import decide

Factory = Callable[..., Any]
NARROW = {"layers.2": {"saturation": 0.95}}


def asked(score: ScoreRequest, site: str, blueprint: str, **hyperparameters: Any) -> AdaptationDecision:
    requested = RequestAdaptation(site=site, blueprint=blueprint, hyperparameters=hyperparameters)
    return decide(DecisionRequest(score=score, urza=UrzaConfig(), requested=requested))


def test_without_a_request_the_configured_policy_decides(make_request: Factory) -> None:
    grown = decide(DecisionRequest(score=make_request(health=NARROW), urza=UrzaConfig()))
    assert (grown.policy, grown.code, grown.site) == ("heuristic", "grow", "layers.2")
    off = decide(DecisionRequest(score=make_request(health=NARROW, policy="none"), urza=UrzaConfig()))
    assert off.code == "off"
    with pytest.raises(ConfigurationError):
        decide(DecisionRequest(score=make_request(policy="graf"), urza=UrzaConfig()))


def test_a_person_may_grow_what_the_policy_would_not(make_request: Factory) -> None:
    decision = asked(make_request(epoch=1, max_adaptations=0, policy="none"), "layers.6", "lowrank", rank=3)
    assert (decision.kind, decision.code, decision.policy) == (DecisionKind.GERMINATE, "requested", "person")
    assert (decision.site, decision.blueprint, decision.seed) == ("layers.6", "lowrank", 0)
    assert decision.hyperparameters == {"rank": 3}
    assert decision.contract is not None
    assert decision.contract.output_site == "layers.6"


def test_a_requested_blueprint_takes_its_defaults_and_the_next_free_seed(make_request: Factory) -> None:
    states = {"layers.2": [SeedState.TRAINING, SeedState.DORMANT]}
    decision = asked(make_request(states=states), "layers.2", "bottleneck")
    assert decision.seed == 1
    assert decision.hyperparameters["rank"] == 32


@pytest.mark.parametrize(
    ("site", "blueprint", "hyperparameters", "code", "says"),
    [
        ("layers.3", "bottleneck", {}, "unknown_site", "layers.2"),
        ("fc", "bottleneck", {}, "unknown_site", "layers.0"),
        ("layers.2", "bottelneck", {}, "does_not_fit", "did you mean 'bottleneck'"),
        ("layers.6", "widen", {}, "does_not_fit", "does not fit that site"),
        ("layers.2", "bottleneck", {"rnak": 2}, "does_not_fit", "did you mean 'rank'"),
        ("layers.2", "bottleneck", {"rank": 0}, "does_not_fit", "rank"),
    ],
)
def test_a_request_that_cannot_be_done_waits_and_says_why(
    make_request: Factory, site: str, blueprint: str, hyperparameters: dict[str, Any], code: str, says: str
) -> None:
    decision = asked(make_request(), site, blueprint, **hyperparameters)
    assert (decision.kind, decision.code) == (DecisionKind.WAIT, code)
    assert says in decision.reason
    assert f"{blueprint} at {site} was asked for" in decision.reason
    assert decision.alternatives


@pytest.mark.parametrize(
    ("situation", "code"),
    [
        ({"pinned": ["layers.2"]}, "pinned"),
        ({"pinned": ["layers.4"]}, "pinned"),
        ({"in_flight": "run-1/a1"}, "busy"),
        ({"held": "run-1/a1"}, "hold"),
        ({"hold_window_steps": 5000}, "horizon"),
        ({"states": {"layers.2": [SeedState.FOSSILIZED] * 2}}, "no_free_seed"),
    ],
)
def test_what_makes_a_graft_impossible_binds_a_person_too(
    make_request: Factory, situation: dict[str, Any], code: str
) -> None:
    decision = asked(make_request(**situation), "layers.2", "widen")
    assert (decision.kind, decision.code) == (DecisionKind.WAIT, code)


def test_a_person_may_try_again_what_was_culled(make_request: Factory, make_adaptation: Factory) -> None:
    record = [make_adaptation(1, AdaptationState.CULLED, judge_step=799)]
    assert asked(make_request(adaptations=record), "layers.2", "widen").code == "requested"
