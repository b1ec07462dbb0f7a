"""Tests of the policies: what they may never do, what they must always say, and what they choose."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts.enums import AdaptationState
from esper.contracts.enums import DecisionKind
from esper.contracts.enums import SeedState
from esper.contracts.operational import AdaptationDecision
from esper.contracts.orders import ScoreRequest
from esper.errors import BlueprintError
from esper.errors import ConfigurationError
from esper.runtime.tamiyo.features import HealthView
from esper.runtime.tamiyo.features import describe
from esper.runtime.tamiyo.policies import get_policy
from esper.runtime.tamiyo.policies import list_policies
from esper.runtime.tamiyo.policies import register_policy
from esper.runtime.tamiyo.thresholds import THRESHOLDS
from esper.runtime.tamiyo.thresholds import threshold

Factory = Callable[..., Any]

SITES = ("layers.0", "layers.2", "layers.4", "layers.6")
CODES = {"overfitting", "grow", "hold", "busy", "budget", "horizon", "learning", "warmup", "below_threshold"}

WIDE = {
    "saturation": 0.5,
    "residual_gradient": 0.2,
    "residual_gradient_norm": 1.0,
    "gradient_norm": 0.1,
    "gradient_to_weight": 0.01,
}
NARROW = WIDE | {"saturation": 0.95}
PULLED = WIDE | {"residual_gradient": 0.9, "residual_gradient_norm": 5.0}


def decided(request: ScoreRequest) -> AdaptationDecision:
    return get_policy("heuristic").decide(request, describe(request))


def planted(narrow: str = "layers.2") -> dict[str, dict[str, Any]]:
    return {site: NARROW if site == narrow else WIDE for site in SITES}


measured = st.fixed_dictionaries(
    {},
    optional={
        "saturation": st.floats(min_value=0, max_value=1),
        "residual_gradient_norm": st.floats(min_value=0, max_value=100),
        "gradient_norm": st.floats(min_value=0, max_value=100),
        "gradient_to_weight": st.floats(min_value=0, max_value=100),
        "residual_gradient": st.floats(min_value=0, max_value=1),
    },
)
situations = st.fixed_dictionaries(
    {
        "epoch": st.integers(min_value=1, max_value=30),
        "losses": st.lists(st.floats(min_value=0.01, max_value=10), min_size=1, max_size=30),
        "health": st.dictionaries(st.sampled_from(SITES), measured),
        "pinned": st.sets(st.sampled_from(SITES)).map(sorted),
        "hold_window_steps": st.integers(min_value=0, max_value=2000),
        "lag_epochs": st.integers(min_value=1, max_value=3),
        "max_adaptations": st.integers(min_value=0, max_value=3),
        "held": st.sampled_from([None, None, None, "run-1/a1"]),
        "in_flight": st.sampled_from([None, None, None, "run-1/a1"]),
        "states": st.dictionaries(
            st.sampled_from(SITES), st.lists(st.sampled_from(list(SeedState)), min_size=1, max_size=4)
        ),
        "blueprints": st.sampled_from([("bottleneck", "widen"), ("widen",), ("lowrank",), ("lowrank", "bottleneck")]),
    }
)
records = st.lists(st.tuples(st.sampled_from(list(AdaptationState)), st.sampled_from(SITES)), max_size=3)


@pytest.fixture(scope="session")
def situate(make_request: Factory, make_adaptation: Factory) -> Factory:
    def build(situation: dict[str, Any], record: list[tuple[AdaptationState, str]]) -> ScoreRequest:
        losses = situation["losses"][: situation["epoch"]]
        adaptations = [make_adaptation(i + 1, state, site=site) for i, (state, site) in enumerate(record)]
        request: ScoreRequest = make_request(**{**situation, "losses": losses}, adaptations=adaptations)
        return request

    return build


@given(situation=situations, record=records)
def test_a_policy_orders_only_what_may_be_ordered(
    situate: Factory, situation: dict[str, Any], record: list[tuple[AdaptationState, str]]
) -> None:
    request = situate(situation, record)
    decision = decided(request)
    if decision.kind is DecisionKind.WAIT:
        return
    node = next(node for node in request.report.graph.nodes if node.contract.site == decision.site)
    assert decision.contract is not None
    assert decision.contract.site == decision.site
    assert not {decision.contract.site, decision.contract.output_site} & set(request.pinned)
    assert request.in_flight is None
    assert len(request.adaptations) < request.tamiyo.max_adaptations
    remaining = (request.max_epochs - request.report.epoch) * request.steps_per_epoch
    assert remaining >= request.lag_epochs * request.steps_per_epoch + request.hold_window_steps
    assert request.report.step <= threshold("last_progress") * request.max_epochs * request.steps_per_epoch
    assert not any(state in ("ordered", "delivered", "training") for state, _ in record)
    assert next(seed for seed in node.seeds if seed.index == decision.seed).state is SeedState.DORMANT
    assert decision.site in situation["health"]
    assert decision.blueprint in request.tamiyo.blueprints


@given(situation=situations, record=records)
def test_every_decision_says_why_and_shows_every_pair(
    situate: Factory, situation: dict[str, Any], record: list[tuple[AdaptationState, str]]
) -> None:
    request = situate(situation, record)
    decision = decided(request)
    assert decision.code in CODES
    assert any(character.isdigit() for character in decision.reason)
    assert all(alternative.reason for alternative in decision.alternatives)
    pairs = [(alternative.site, alternative.blueprint) for alternative in decision.alternatives]
    fitting = {(site, blueprint) for site in SITES for blueprint in request.tamiyo.blueprints} - {("layers.6", "widen")}
    assert sorted(pairs) == sorted(fitting)
    assert decision.features["alternatives_omitted"] == 0.0
    assert decision.thresholds == {name: entry.value for name, entry in THRESHOLDS.items()}


@given(situation=situations, record=records)
def test_equal_requests_give_equal_decisions(
    situate: Factory, situation: dict[str, Any], record: list[tuple[AdaptationState, str]]
) -> None:
    request = situate(situation, record)
    again = ScoreRequest.model_validate_json(request.model_dump_json())
    assert decided(request).model_dump_json() == decided(again).model_dump_json()


@given(st.permutations(SITES))
def test_the_order_in_which_health_arrives_does_not_matter(make_request: Factory, order: list[str]) -> None:
    health = planted()
    shuffled = make_request(health={site: health[site] for site in order})
    assert decided(shuffled) == decided(make_request(health=health))


@pytest.mark.parametrize("narrow", ["layers.0", "layers.2", "layers.4"])
def test_a_narrow_layer_is_widened(make_request: Factory, narrow: str) -> None:
    decision = decided(make_request(health=planted(narrow)))
    assert (decision.kind, decision.code) == (DecisionKind.GERMINATE, "grow")
    assert (decision.site, decision.blueprint, decision.seed) == (narrow, "widen", 0)
    assert decision.hyperparameters["units"] >= 10
    assert decision.contract is not None
    assert decision.contract.output_site != narrow


def test_a_narrow_layer_is_repaired_before_anything_is_put_beside_others(make_request: Factory) -> None:
    health = planted() | {"layers.6": PULLED}
    decision = decided(make_request(health=health))
    assert (decision.site, decision.blueprint) == ("layers.2", "widen")
    without = decided(make_request(health=health, blueprints=("bottleneck",)))
    assert (without.site, without.blueprint) == ("layers.6", "bottleneck")


def test_the_strongest_pull_gets_the_bottleneck(make_request: Factory) -> None:
    health = {site: PULLED | {"residual_gradient_norm": 2.0 + i} for i, site in enumerate(SITES)}
    decision = decided(make_request(health=health))
    assert (decision.site, decision.blueprint) == ("layers.6", "bottleneck")
    assert decision.alternatives[0].site == "layers.6"


def test_a_healthy_host_is_left_alone(make_request: Factory) -> None:
    decision = decided(make_request())
    assert (decision.kind, decision.code) == (DecisionKind.WAIT, "below_threshold")
    assert len(decision.alternatives) == 7


def test_what_was_not_measured_is_neither_healthy_nor_chosen(make_request: Factory) -> None:
    decision = decided(make_request(health={}))
    assert decision.code == "below_threshold"
    assert not any(alternative.eligible for alternative in decision.alternatives)
    assert all("not measured" in alternative.reason for alternative in decision.alternatives)


def test_a_first_free_slot_is_taken(make_request: Factory) -> None:
    states = {"layers.2": [SeedState.FOSSILIZED, SeedState.DORMANT, SeedState.DORMANT]}
    assert decided(make_request(health=planted(), states=states)).seed == 1


def test_a_slot_that_the_record_holds_is_not_free(make_request: Factory, make_adaptation: Factory) -> None:
    """The report may be older than the verdict on the seed that it still shows as dormant."""
    record = [make_adaptation(1, AdaptationState.FOSSILIZED, blueprint="bottleneck", seed=0)]
    assert decided(make_request(health=planted(), adaptations=record)).seed == 1


def test_units_that_were_grown_count_as_unused(make_request: Factory) -> None:
    """The probe sees the two old units only; ten new ones beside them make the layer wide."""
    request = make_request(health=planted())
    node = request.report.graph.nodes[1]
    grown = node.seeds[0].model_copy(
        update={"state": SeedState.FOSSILIZED, "blueprint": "widen", "parameters": 10 * (12 + 1 + 12)}
    )
    nodes = [*request.report.graph.nodes]
    nodes[1] = node.model_copy(update={"seeds": (grown, *node.seeds[1:])})
    graph = request.report.graph.model_copy(update={"nodes": tuple(nodes)})
    widened = request.model_copy(update={"report": request.report.model_copy(update={"graph": graph})})
    assert decided(request).blueprint == "widen"
    assert describe(widened).node("layers.2", "widened_share") == pytest.approx(10 / 12)
    assert decided(widened).code == "below_threshold"


def test_controls_are_grown_only_where_nothing_else_is_configured(make_request: Factory) -> None:
    mixed = decided(make_request(blueprints=("lowrank", "bottleneck")))
    assert mixed.code == "below_threshold"
    assert {a.score for a in mixed.alternatives if a.blueprint == "lowrank"} == {0.0}
    alone = decided(make_request(blueprints=("lowrank",)))  # none has evidence: the cheapest
    assert (alone.kind, alone.blueprint, alone.site) == (DecisionKind.GERMINATE, "lowrank", "layers.2")


def test_record_stays_small_for_many_sites(make_request: Factory) -> None:
    health = {f"layers.{2 * i}": dict(NARROW) for i in range(64)}
    health["layers.100"]["saturation"] = 0.99
    decision = decided(make_request(widths=[16] * 65, health=health))
    assert len(decision.model_dump_json().encode()) <= 20_000
    assert decision.site == "layers.100"
    assert decision.alternatives[0].site == "layers.100"
    assert len(decision.alternatives) + decision.features["alternatives_omitted"] == 64 + 63
    assert decision.features["alternatives_omitted"] > 0


def test_unknown_policy_lists_near_names() -> None:
    with pytest.raises(ConfigurationError, match="did you mean heuristic") as caught:
        get_policy("heurisitc")
    assert caught.value.code == "ESP-204"
    with pytest.raises(ConfigurationError, match="heuristic, none"):
        get_policy("zzz")


def test_unknown_blueprint_is_refused_by_name(make_request: Factory) -> None:
    with pytest.raises(BlueprintError, match="bottelneck"):
        decided(make_request(blueprints=("bottelneck",)))


def test_none_never_grows(make_request: Factory) -> None:
    request = make_request(health=planted(), policy="none")
    decision = get_policy("none").decide(request, describe(request))
    assert (decision.kind, decision.code, decision.policy) == (DecisionKind.WAIT, "off", "none")


def test_a_policy_of_ones_own_is_one_more_entry(make_request: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    import esper.runtime.tamiyo.policies as registry

    monkeypatch.setattr(registry, "_POLICIES", dict(registry._POLICIES))

    @register_policy("stubborn")
    class Stubborn:
        name: str

        def decide(self, request: ScoreRequest, graph: HealthView) -> AdaptationDecision:
            return AdaptationDecision(
                run_id=request.run_id,
                epoch=request.report.epoch,
                policy=self.name,
                kind=DecisionKind.WAIT,
                code="stubborn",
                reason=f"progress is {graph.run('progress')}",
            )

    assert list_policies() == ("heuristic", "none", "stubborn")
    request = make_request()
    assert get_policy("stubborn").decide(request, describe(request)).policy == "stubborn"
    with pytest.raises(ConfigurationError, match="registered twice"):
        register_policy("stubborn")(Stubborn)


def test_every_threshold_says_where_it_comes_from() -> None:
    assert all(len(entry.source.split()) >= 10 for entry in THRESHOLDS.values())


def test_a_model_that_no_blueprint_fits_is_left_alone(make_request: Factory) -> None:
    decision = decided(make_request(widths=(8, 4), blueprints=("widen",)))
    assert (decision.code, decision.alternatives) == ("below_threshold", ())
    assert "fits any site" in decision.reason
