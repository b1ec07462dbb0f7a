"""One decision as the `TamiyoDecision` workflow orders it: the policy's choice, or a person's request checked."""

from difflib import get_close_matches

from esper.contracts.messages import RequestAdaptation
from esper.contracts.operational import AdaptationDecision
from esper.contracts.operational import Alternative
from esper.contracts.orders import DecisionRequest
from esper.contracts.orders import ScoreRequest
from esper.errors import BlueprintError
from esper.runtime.tamiyo.by_hand import PERSON
from esper.runtime.tamiyo.candidates import Candidate
from esper.runtime.tamiyo.candidates import candidates
from esper.runtime.tamiyo.candidates import free_slot
from esper.runtime.tamiyo.features import HealthView
from esper.runtime.tamiyo.gates import Wait
from esper.runtime.tamiyo.gates import horizon
from esper.runtime.tamiyo.gates import occupied
from esper.runtime.tamiyo.graph import build_graph
from esper.runtime.tamiyo.policies import get_policy
from esper.runtime.tamiyo.policies import ordering
from esper.runtime.tamiyo.policies import waiting
from esper.runtime.tezzeret.blueprints.registry import cost
from esper.runtime.tezzeret.blueprints.registry import get_blueprint
from esper.runtime.tezzeret.blueprints.registry import resolve_hyperparameters
from esper.runtime.tezzeret.blueprints.registry import site_contract_for


def decide(request: DecisionRequest) -> AdaptationDecision:
    """The decision on one report. Deterministic; raises only for an unknown policy (`ConfigurationError`
    ESP-204) or an unknown configured blueprint (`BlueprintError`)."""
    graph = build_graph(request.score)
    if request.requested is not None:
        return decide_requested(request.score, graph, request.requested)
    return get_policy(request.score.tamiyo.policy).decide(request.score, graph)


def decide_requested(request: ScoreRequest, graph: HealthView, wanted: RequestAdaptation) -> AdaptationDecision:
    """What a person asked for, ordered if it can be done, else WAIT with why not.

    A person may grow what the policy would not: warm-up, loss slope, scores, cooldown and budget do not
    bind. What makes a graft impossible or impossible to judge does: one at a time, the horizon, pinned
    sites, an occupied site, a blueprint that does not fit.
    """
    ranked = candidates(request, graph)
    found = _requested_candidate(request, wanted)
    if isinstance(found, Wait):
        return waiting(request, graph, PERSON, found, ranked)
    reason = f"a person asked for {wanted.blueprint} at {wanted.site}; it takes seed {found.seed}"
    return ordering(request, graph, PERSON, "requested", reason, found, ranked)


def _requested_candidate(request: ScoreRequest, wanted: RequestAdaptation) -> Candidate | Wait:
    asked = f"{wanted.blueprint} at {wanted.site} was asked for"
    nodes = {node.contract.site: node for node in request.report.graph.nodes}
    node = nodes.get(wanted.site)
    if node is None:
        near = get_close_matches(wanted.site, nodes, n=3) or list(nodes)[:5]
        return Wait("unknown_site", f"{asked}, but there is no such site; nearest of {len(nodes)}: {', '.join(near)}")
    try:
        get_blueprint(wanted.blueprint)
        contract = site_contract_for(wanted.blueprint, node, request.report.graph)
        if contract is None:
            return Wait("does_not_fit", f"{asked}, but it does not fit that site ({node.contract.kind})")
        hyperparameters = resolve_hyperparameters(wanted.blueprint, contract, wanted.hyperparameters)
        parameters, flops = cost(wanted.blueprint, contract, hyperparameters)
    except BlueprintError as error:
        return Wait("does_not_fit", f"{asked}, but: {error}")
    for touched in dict.fromkeys((contract.site, contract.output_site)):
        if touched in request.pinned:
            return Wait("pinned", f"{asked}, but {touched} is pinned")
    shut = occupied(request) or horizon(request)
    if shut is not None:
        return Wait(shut.code, f"{asked}, but {shut.reason}")
    seed = free_slot(request, node)
    if seed is None:
        return Wait("no_free_seed", f"{asked}, but none of its {len(node.seeds)} seeds is dormant")
    alternative = Alternative(
        site=wanted.site,
        blueprint=wanted.blueprint,
        hyperparameters=hyperparameters,
        score=0.0,
        threshold=0.0,
        added_parameters=parameters,
        added_flops_per_sample=flops,
        eligible=True,
        reason="asked for by a person",
    )
    return Candidate(alternative=alternative, contract=contract, seed=seed, strength=0.0)
