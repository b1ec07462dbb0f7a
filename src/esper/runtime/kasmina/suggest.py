"""Where and what to grow, for one's own training loop: what a run's strategist would weigh, from one batch."""

import math
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from torch import Tensor
from torch import nn

from esper.contracts.assets import Hyperparameters
from esper.contracts.config import TamiyoConfig
from esper.contracts.enums import SeedState
from esper.contracts.operational import HealthSignal
from esper.contracts.operational import LayerGraph
from esper.contracts.operational import SiteNode
from esper.errors import GrowthError
from esper.errors import TargetError
from esper.runtime.kasmina.health.scores import EVIDENCE_THRESHOLDS
from esper.runtime.kasmina.health.scores import PAIR_SATURATION
from esper.runtime.kasmina.health.scores import evidence_for
from esper.runtime.kasmina.health.scores import pair_saturation
from esper.runtime.kasmina.health.scores import rank
from esper.runtime.kasmina.health.scores import residual_pull
from esper.runtime.kasmina.health.scores import signals_by_site
from esper.runtime.kasmina.health.scores import strongest_pull
from esper.runtime.kasmina.health.scores import told
from esper.runtime.kasmina.health.scores import widened_share
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.lineage import layer_graph
from esper.runtime.kasmina.probe import ProbeCapture
from esper.runtime.kasmina.probe import capture
from esper.runtime.kasmina.wrapping.morphable import listed
from esper.runtime.kasmina.wrapping.morphable import model_state
from esper.runtime.kasmina.wrapping.morphable import sites_of
from esper.runtime.tezzeret.blueprints.registry import cost
from esper.runtime.tezzeret.blueprints.registry import get_blueprint
from esper.runtime.tezzeret.blueprints.registry import resolve_hyperparameters
from esper.runtime.tezzeret.blueprints.registry import site_contract_for

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Suggestion:
    """One (site, blueprint) pair, as `graft(model, site, blueprint, **hyperparameters)` takes it.

    `score` is the evidence for it, 0 to about 1, and None where this batch could not tell; from `threshold` on it is
    worth a try. `parameters` and `flops_per_sample` (one forward) are what it would add.
    """

    site: str
    blueprint: str
    score: float | None
    threshold: float
    parameters: int
    flops_per_sample: int
    reason: str
    hyperparameters: Hyperparameters = field(default_factory=dict)
    possible: bool = True

    @property
    def convincing(self) -> bool:
        """Can be grafted, and its evidence reaches the threshold."""
        return self.possible and self.score is not None and self.score >= self.threshold


class Suggestions(tuple[Suggestion, ...]):
    """Suggestions, strongest first; a table when printed."""

    __slots__ = ()

    def __str__(self) -> str:
        if not self:
            return "no blueprint fits a site of this model"
        rows = [("", "site", "blueprint", "score", "parameters", "FLOPs/sample", "why")]
        for each in self:
            score = "-" if each.score is None else f"{each.score:.3f}"
            cost_of = (f"{each.parameters:,}", f"{each.flops_per_sample:,}")
            rows.append(("*" if each.convincing else "", each.site, each.blueprint, score, *cost_of, each.reason))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        count = sum(each.convincing for each in self)
        lines.append(f"{count} of {len(self)} convincing (*)" if count else f"none of {len(self)} is convincing")
        return "\n".join(lines)


def suggest(
    model: nn.Module, loss: Loss, batch: Any, *, blueprints: Iterable[str] | None = None
) -> tuple[Suggestion, ...]:
    """Every one of `blueprints` (default: those that a run's strategist weighs, `bottleneck` and `widen`) at every
    site that it fits, strongest first.

    `loss(model, batch)` returns the scalar that is trained on; it is called twice, with one backward. `widen` is
    scored by the saturation of the pair (NORTH, arXiv 2202.08539), every other by the part of the loss gradient that
    the site's own input cannot explain (TINY, arXiv 2405.19816; SENN, arXiv 2307.04526). 512 rows or more say most:
    the latter needs twice as many rows as the layer has inputs. Whether growth pays, only training on tells.

    Nothing in the model changes: parameters, buffers, gradients, training flags and random generators stay, to the
    bit. Raises SiteError ESP-314 (not wrapped), BlueprintError ESP-421 (unknown blueprint), TargetError ESP-312 (no
    scalar with a gradient), GrowthError ESP-435 (a loss, an output or a gradient that is not finite).
    """
    model_state(model)
    names = tuple(dict.fromkeys(TamiyoConfig().blueprints if blueprints is None else blueprints))
    for name in names:
        get_blueprint(name)
    graph = _without_folded(model, layer_graph(model, lambda: loss(model, batch)))
    taken = capture(model, lambda: _checked(loss(model, batch)))
    if not math.isfinite(float(taken.loss)):
        raise GrowthError("ESP-435", f"the loss of this batch is {float(taken.loss)}: nothing can be scored by it")
    signals = taken.signals()
    _refuse_broken(taken, signals)
    found = list(_pairs(graph, signals_by_site(signals), names))
    return Suggestions(sorted(found, key=_place))


def _refuse_broken(taken: ProbeCapture, signals: Iterable[HealthSignal]) -> None:
    outputs = [signal.site for signal in signals if signal.error_count]
    norms = [(site.site, site.norms.gradient) for site in taken.sites]
    gradients = [site for site, norm in norms if norm is not None and not math.isfinite(float(norm))]
    for what, sites in (("outputs", outputs), ("gradients of the weights", gradients)):
        if sites:
            raise GrowthError(
                "ESP-435",
                f"{what} of this batch are not finite at {listed(sites)}: nothing can be scored by them",
                hint="look for a division by zero or a root of zero there, or give another batch",
            )


def _pairs(graph: LayerGraph, signals: dict[str, HealthSignal], names: tuple[str, ...]) -> Iterator[Suggestion]:
    strongest = strongest_pull(graph, signals)
    for node in graph.nodes:
        signal = signals.get(node.contract.site)
        for name in names:
            contract = site_contract_for(name, node, graph)
            if contract is None:
                continue
            hyperparameters = resolve_hyperparameters(name, contract, {})
            parameters, flops = cost(name, contract, hyperparameters)
            feature = evidence_for(name)
            limit = EVIDENCE_THRESHOLDS[feature].value
            if feature == PAIR_SATURATION:
                score = pair_saturation(signal, widened_share(node, graph))
            else:
                score = residual_pull(node, signal, strongest)
            obstacle = _obstacle(node, name, feature, score, signal)
            evidence = "" if score is None else told(feature, score, limit)
            yield Suggestion(
                site=node.contract.site,
                blueprint=name,
                score=score,
                threshold=limit,
                parameters=parameters,
                flops_per_sample=flops,
                reason=obstacle or evidence,
                hyperparameters=hyperparameters,
                possible=obstacle is None,
            )


def _obstacle(
    node: SiteNode, blueprint: str, feature: str, score: float | None, signal: HealthSignal | None
) -> str | None:
    """Why this pair is not to be grafted, whatever its score."""
    if all(seed.state is not SeedState.DORMANT for seed in node.seeds):
        return "no seed of this site is dormant"
    if score is None:
        rows = 0 if signal is None else signal.rows_seen
        return f"{feature} is not known from the {rows} rows of this batch"
    if get_blueprint(blueprint).capacity_free:
        return "a control: it adds no capacity"
    return None


def _place(each: Suggestion) -> tuple[bool, bool, bool, float, int, int]:
    return rank(
        convincing=each.convincing,
        eligible=each.possible,
        blueprint=each.blueprint,
        strength=0.0 if each.score is None else each.score / each.threshold,
        flops=each.flops_per_sample,
        parameters=each.parameters,
    )


def _without_folded(model: nn.Module, graph: LayerGraph) -> LayerGraph:
    """A block that was folded is part of its host, and stands beside it no longer."""
    folded = {
        (slot.seed.site, slot.seed.index)
        for module in sites_of(model).values()
        for slot in state_of(module).slots
        if slot.folded
    }
    nodes = (
        node.model_copy(update={"seeds": tuple(seed for seed in node.seeds if (seed.site, seed.index) not in folded)})
        for node in graph.nodes
    )
    return graph.model_copy(update={"nodes": tuple(nodes)})


def _checked(found: Any) -> Tensor:
    if not isinstance(found, Tensor) or found.numel() != 1:
        what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise TargetError("ESP-312", f"loss(model, batch) returned {what}, not one scalar", hint="return the mean")
    if not found.requires_grad:
        raise TargetError(
            "ESP-312",
            "loss(model, batch) returned a value without a gradient",
            hint="do not detach it; train something",
        )
    return found.reshape(())


def _aligned(row: tuple[str, ...], widths: list[int]) -> Iterator[str]:
    """Numbers to the right, words to the left."""
    for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.rjust(width) if column in (3, 4, 5) else cell.ljust(width)
