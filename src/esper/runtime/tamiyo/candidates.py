"""Where and what: every (site, blueprint) pair with its score, its cost and whether it may be ordered."""

from collections.abc import Iterator
from dataclasses import dataclass

from esper.contracts.assets import SiteContract
from esper.contracts.base import SiteName
from esper.contracts.enums import AdaptationState
from esper.contracts.enums import SeedState
from esper.contracts.operational import Alternative
from esper.contracts.operational import SiteNode
from esper.contracts.orders import ScoreRequest
from esper.runtime.kasmina.health.scores import evidence_for
from esper.runtime.kasmina.health.scores import rank
from esper.runtime.kasmina.health.scores import told
from esper.runtime.tamiyo.features import HealthView
from esper.runtime.tamiyo.gates import ended_step
from esper.runtime.tamiyo.thresholds import threshold
from esper.runtime.tezzeret.blueprints.registry import cost
from esper.runtime.tezzeret.blueprints.registry import get_blueprint
from esper.runtime.tezzeret.blueprints.registry import resolve_hyperparameters
from esper.runtime.tezzeret.blueprints.registry import site_contract_for

ALTERNATIVES_BYTES = 16_384
"""Room for the alternatives in one decision record, which as a whole is at most about 20 KB."""

DID_NOT_STAY = (
    AdaptationState.CULLED,
    AdaptationState.MISSED,
    AdaptationState.FAILED,
    AdaptationState.VETOED,
    AdaptationState.STALE,
)


@dataclass(frozen=True)
class Candidate:
    """One pair: what the forge must know of it, the slot it would take, its score relative to its threshold."""

    alternative: Alternative
    contract: SiteContract
    seed: int | None
    strength: float

    @property
    def convincing(self) -> bool:
        """May be ordered and its evidence reaches the threshold."""
        return self.alternative.eligible and self.alternative.score >= self.alternative.threshold


def candidates(request: ScoreRequest, graph: HealthView) -> tuple[Candidate, ...]:
    """Every configured blueprint at every site that it fits, strongest first (`rank`). Remaining ties go to module
    order, then to the order of `tamiyo.blueprints`: the order is total, so equal requests give equal decisions."""

    def place(candidate: Candidate) -> tuple[bool, bool, bool, float, int, int]:
        alternative = candidate.alternative
        return rank(
            convincing=candidate.convincing,
            eligible=alternative.eligible,
            blueprint=alternative.blueprint,
            strength=candidate.strength,
            flops=alternative.added_flops_per_sample,
            parameters=alternative.added_parameters,
        )

    return tuple(sorted(_pairs(request, graph), key=place))


def trimmed(ranked: tuple[Candidate, ...]) -> tuple[Alternative, ...]:
    """The alternatives of the strongest candidates that fit into `ALTERNATIVES_BYTES` of JSON.

    The rest are counted by the caller (`alternatives_omitted`), never silently dropped.
    """
    kept: list[Alternative] = []
    room = ALTERNATIVES_BYTES
    for candidate in ranked:
        room -= len(candidate.alternative.model_dump_json().encode()) + 1
        if room < 0:
            break
        kept.append(candidate.alternative)
    return tuple(kept)


def free_slot(request: ScoreRequest, node: SiteNode) -> int | None:
    """The first dormant slot of a site that no adaptation of the record holds: the record may be newer than
    the report."""
    site = node.contract.site
    held = {each.seed for each in request.adaptations if each.site == site and each.state not in DID_NOT_STAY}
    return next(
        (seed.index for seed in node.seeds if seed.state is SeedState.DORMANT and seed.index not in held),
        None,
    )


def _pairs(request: ScoreRequest, graph: HealthView) -> Iterator[Candidate]:
    blueprints = tuple(dict.fromkeys(request.tamiyo.blueprints))
    controls = {name for name in blueprints if get_blueprint(name).capacity_free}
    only_controls = len(controls) == len(blueprints)
    for node in request.report.graph.nodes:
        for name in blueprints:
            contract = site_contract_for(name, node, request.report.graph)
            if contract is None:
                continue
            hyperparameters = resolve_hyperparameters(name, contract, {})
            parameters, flops = cost(name, contract, hyperparameters)
            control = name in controls
            feature = evidence_for(name)
            measured = graph.node(contract.site, feature)
            limit = 0.0 if control else threshold(feature)
            score = 0.0 if control or measured is None else measured
            seed = free_slot(request, node)
            obstacle = _obstacle(request, contract.site, contract.output_site, name, seed)
            if obstacle is None and measured is None:
                obstacle = f"{feature} was not measured there, and unknown is not healthy"
            if obstacle is None and control and not only_controls:
                obstacle = "a control adds no capacity and is only grown where nothing else is configured"
            yield Candidate(
                alternative=Alternative(
                    site=contract.site,
                    blueprint=name,
                    hyperparameters=hyperparameters,
                    score=score,
                    threshold=limit,
                    added_parameters=parameters,
                    added_flops_per_sample=flops,
                    eligible=obstacle is None,
                    reason=obstacle or _evidence(control, feature, score, limit),
                ),
                contract=contract,
                seed=seed,
                strength=score / limit if limit > 0 else 0.0,
            )


def _evidence(control: bool, feature: str, score: float, limit: float) -> str:
    if control:
        return "a control: it adds no capacity, so it is grown without evidence"
    return told(feature, score, limit)


def _obstacle(
    request: ScoreRequest, site: SiteName, output_site: SiteName, blueprint: str, seed: int | None
) -> str | None:
    """Why this pair may not be ordered, whatever its score."""
    for touched in dict.fromkeys((site, output_site)):
        if touched in request.pinned:
            return f"{touched} is pinned"
    if seed is None:
        return "no seed of this site is dormant"
    return _cooling(request, site, blueprint)


def _cooling(request: ScoreRequest, site: SiteName, blueprint: str) -> str | None:
    """A pair that did not stay rests for `cooldown_holds` hold windows after its end."""
    rest = round(threshold("cooldown_holds") * request.hold_window_steps)
    for adaptation in reversed(request.adaptations):
        if (adaptation.site, adaptation.blueprint) == (site, blueprint) and adaptation.state in DID_NOT_STAY:
            until = ended_step(request, adaptation) + rest
            if request.report.step < until:
                return f"{adaptation.adaptation_id} was {adaptation.state} here; not again before step {until}"
            return None
    return None
