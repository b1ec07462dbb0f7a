"""What Tamiyo knows of a run, as numbers without a scale: the pure description of the health graph.

Nothing here needs torch, so the features can be computed, tested and recorded anywhere; `graph` turns
them into a PyTorch Geometric `Data` and reads them back from it.
"""

import math
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from esper.contracts.base import SiteName
from esper.contracts.enums import AdaptationState
from esper.contracts.enums import SeedState
from esper.contracts.operational import EpochReport
from esper.contracts.operational import HealthSignal
from esper.contracts.operational import LayerGraph
from esper.contracts.operational import SiteNode
from esper.contracts.orders import ScoreRequest
from esper.runtime.kasmina.health.scores import GROWN
from esper.runtime.kasmina.health.scores import channels
from esper.runtime.kasmina.health.scores import pair_saturation
from esper.runtime.kasmina.health.scores import residual_pull
from esper.runtime.kasmina.health.scores import signals_by_site
from esper.runtime.kasmina.health.scores import strongest_pull
from esper.runtime.kasmina.health.scores import widened_share
from esper.runtime.tamiyo.slope import improvement_window
from esper.runtime.tamiyo.slope import losses
from esper.runtime.tamiyo.slope import relative_improvement
from esper.runtime.tamiyo.slope import val_to_train

KINDS = ("linear", "conv2d")
"""Host kinds with a column of their own; every other kind sets `kind.other`, so a new host needs no new column."""

STRUCTURE = (
    *(f"kind.{kind}" for kind in KINDS),
    "kind.other",
    "log_fan_in",
    "log_fan_out",
    "log_width_to_previous",
    "log_width_to_next",
    "depth_share",
    "parameter_share",
    "flops_share",
    "free_slot_share",
    "grown_slot_share",
    "begins_widen_pair",
    "widened_share",
    "pinned",
)
"""Node features that are always known."""

MEASURED = (
    "saturation",
    "pair_saturation",
    "residual_pull",
    "residual_gradient",
    "residual_gradient_share",
    "gradient_share",
    "log_gradient_to_weight",
    "log_update_to_weight",
    "log_newborn_to_incumbent_gradient",
    "dead_neuron_ratio",
    "log_activation_variance",
    "average_correlation",
)
"""Node features that a probe measures or does not: each has a known bit at the end of the row.

`pair_saturation` and `residual_pull` are those of `kasmina.health.scores`. Unlike the bare norm of the residual
gradient, the pull stays the same when a layer is scaled up and the next one down, and when the probe sees more rows.
"""

NODE_FEATURES = (*STRUCTURE, *MEASURED, *(f"known.{name}" for name in MEASURED))

RELATIONS = ("feeds", "fed_by", "widens_into", "widened_from")
"""Edge types. Dataflow and widen pairs (Linear -> activation -> Linear), each in both directions."""

RUN_STRUCTURE = (
    "progress",
    "log_train_loss",
    "log_val_loss",
    "budget_left",
    "kept_share",
    "culled_share",
    "log_sites",
)
RUN_MEASURED = ("train_improvement", "val_improvement", "val_to_train")
RUN_FEATURES = (*RUN_STRUCTURE, *RUN_MEASURED, *(f"known.{name}" for name in RUN_MEASURED))
"""Features of the whole run; the last ones are unknown until enough epochs are over."""


class HealthView(Protocol):
    """What a policy may read of the health graph. `None` is "not measured", never "healthy"."""

    def node(self, site: SiteName, feature: str) -> float | None:
        """One of `STRUCTURE` or `MEASURED` at one site."""
        ...

    def run(self, feature: str) -> float | None:
        """One of `RUN_STRUCTURE` or `RUN_MEASURED`."""
        ...


@dataclass(frozen=True)
class FeatureEdge:
    """One directed edge between node rows; `relation` indexes `RELATIONS`."""

    source: int
    target: int
    relation: int
    log_elements: float


@dataclass(frozen=True)
class HealthFeatures:
    """The health graph as plain numbers, itself a `HealthView`.

    `nodes` has one row of `len(NODE_FEATURES)` per site in the order of `sites`; `run_row` has
    `len(RUN_FEATURES)` entries. Everything is finite.
    """

    sites: tuple[SiteName, ...]
    nodes: tuple[tuple[float, ...], ...]
    edges: tuple[FeatureEdge, ...]
    run_row: tuple[float, ...]

    def node(self, site: SiteName, feature: str) -> float | None:
        return read_feature(self.nodes[self.sites.index(site)], NODE_FEATURES, feature)

    def run(self, feature: str) -> float | None:
        return read_feature(self.run_row, RUN_FEATURES, feature)


def read_feature(row: Sequence[float], columns: Sequence[str], feature: str) -> float | None:
    """The value of `feature` in `row`, or `None` when its known bit is down."""
    known = f"known.{feature}"
    if known in columns and row[columns.index(known)] == 0.0:
        return None
    return row[columns.index(feature)]


def describe(request: ScoreRequest) -> HealthFeatures:
    """The health graph of the request's report."""
    graph = request.report.graph
    sites = tuple(node.contract.site for node in graph.nodes)
    signals = signals_by_site(request.report.health)
    totals = _Totals.of(request.report, signals)
    neighbours = _Neighbours.of(graph, totals.widths)
    return HealthFeatures(
        sites=sites,
        nodes=tuple(
            _node_row(node, graph, signals.get(node.contract.site), totals, neighbours, request.pinned)
            for node in graph.nodes
        ),
        edges=tuple(_edges(graph, {site: index for index, site in enumerate(sites)})),
        run_row=_run_row(request),
    )


@dataclass(frozen=True)
class _Totals:
    """What single sites are measured against: the whole model, and the other sites' widths."""

    parameters: int
    flops: int
    depth: int
    gradient: float
    residual_gradient: float
    strongest_pull: float
    widths: Mapping[SiteName, int]

    @classmethod
    def of(cls, report: EpochReport, signals: Mapping[SiteName, HealthSignal]) -> "_Totals":
        graph = report.graph
        return cls(
            parameters=sum(node.parameter_count for node in graph.nodes),
            flops=sum(node.flops_per_sample for node in graph.nodes),
            depth=max((node.depth for node in graph.nodes), default=0),
            gradient=sum(signal.gradient_norm or 0.0 for signal in signals.values()),
            residual_gradient=sum(signal.residual_gradient_norm or 0.0 for signal in signals.values()),
            strongest_pull=strongest_pull(graph, signals),
            widths={node.contract.site: channels(node.contract) for node in graph.nodes},
        )


@dataclass(frozen=True)
class _Neighbours:
    """Output widths of the sites that feed each site and that it feeds."""

    previous: Mapping[SiteName, tuple[int, ...]]
    next: Mapping[SiteName, tuple[int, ...]]

    @classmethod
    def of(cls, graph: LayerGraph, widths: Mapping[SiteName, int]) -> "_Neighbours":
        known = [edge for edge in graph.edges if edge.source in widths and edge.target in widths]
        return cls(
            previous={site: tuple(widths[edge.source] for edge in known if edge.target == site) for site in widths},
            next={site: tuple(widths[edge.target] for edge in known if edge.source == site) for site in widths},
        )


def _log_ratio(width: int, others: Sequence[int]) -> float:
    return math.log(width * len(others) / sum(others)) if others and sum(others) and width else 0.0


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _log(value: float) -> float:
    """Logarithm of a ratio that may be zero; the floor keeps a dead layer finite."""
    return math.log(max(value, 1e-12))


def _signed_log(value: float) -> float:
    return math.copysign(math.log1p(abs(value)), value)


def _node_row(
    node: SiteNode,
    graph: LayerGraph,
    signal: HealthSignal | None,
    totals: _Totals,
    neighbours: _Neighbours,
    pinned: Sequence[SiteName],
) -> tuple[float, ...]:
    contract = node.contract
    slots = len(node.seeds)
    width = channels(contract)
    structure = {
        **{f"kind.{kind}": float(contract.kind == kind) for kind in KINDS},
        "kind.other": float(contract.kind not in KINDS),
        "log_fan_in": math.log1p(math.prod(contract.input_shape)),
        "log_fan_out": math.log1p(math.prod(contract.output_shape)),
        "log_width_to_previous": _log_ratio(width, neighbours.previous[contract.site]),
        "log_width_to_next": _log_ratio(width, neighbours.next[contract.site]),
        "depth_share": _share(node.depth, totals.depth),
        "parameter_share": _share(node.parameter_count, totals.parameters),
        "flops_share": _share(node.flops_per_sample, totals.flops),
        "free_slot_share": _share(sum(seed.state is SeedState.DORMANT for seed in node.seeds), slots),
        "grown_slot_share": _share(sum(seed.state in GROWN for seed in node.seeds), slots),
        "begins_widen_pair": float(node.widen_output is not None),
        "widened_share": widened_share(node, graph),
        "pinned": float(contract.site in pinned),
    }
    measured = _measured(node, signal, totals, structure["widened_share"])
    return (
        *(structure[name] for name in STRUCTURE),
        *_masked(measured, MEASURED),
    )


def _measured(node: SiteNode, signal: HealthSignal | None, totals: _Totals, widened: float) -> dict[str, float | None]:
    if signal is None or signal.rows_seen == 0:
        return dict.fromkeys(MEASURED)
    norm = signal.residual_gradient_norm
    return {
        "saturation": signal.saturation,
        "pair_saturation": pair_saturation(signal, widened),
        "residual_pull": residual_pull(node, signal, totals.strongest_pull),
        "residual_gradient": signal.residual_gradient,
        "residual_gradient_share": None if norm is None else _share(norm, totals.residual_gradient),
        "gradient_share": None if signal.gradient_norm is None else _share(signal.gradient_norm, totals.gradient),
        "log_gradient_to_weight": _optional_log(signal.gradient_to_weight),
        "log_update_to_weight": _optional_log(signal.update_to_weight),
        "log_newborn_to_incumbent_gradient": _optional_log(signal.newborn_to_incumbent_gradient),
        "dead_neuron_ratio": signal.dead_neuron_ratio,
        "log_activation_variance": _optional_log(signal.activation_variance),
        "average_correlation": signal.average_correlation,
    }


def _optional_log(value: float | None) -> float | None:
    return None if value is None else _log(value)


def _masked(values: Mapping[str, float | None], names: Sequence[str]) -> Iterator[float]:
    """The values with 0 for unknown ones, then one known bit each."""
    for name in names:
        value = values[name]
        yield 0.0 if value is None else value
    for name in names:
        yield float(values[name] is not None)


def _edges(graph: LayerGraph, index: Mapping[SiteName, int]) -> Iterator[FeatureEdge]:
    for edge in graph.edges:
        if edge.source in index and edge.target in index:
            log_elements = math.log1p(edge.elements)
            yield FeatureEdge(index[edge.source], index[edge.target], RELATIONS.index("feeds"), log_elements)
            yield FeatureEdge(index[edge.target], index[edge.source], RELATIONS.index("fed_by"), log_elements)
    for node in graph.nodes:
        if node.widen_output is not None and node.widen_output in index:
            first, second = index[node.contract.site], index[node.widen_output]
            log_elements = math.log1p(math.prod(node.contract.output_shape))
            yield FeatureEdge(first, second, RELATIONS.index("widens_into"), log_elements)
            yield FeatureEdge(second, first, RELATIONS.index("widened_from"), log_elements)


def _run_row(request: ScoreRequest) -> tuple[float, ...]:
    report = request.report
    total = request.max_epochs * request.steps_per_epoch
    ordered = request.forgotten.ordered + len(request.adaptations)
    kept = sum(adaptation.state is AdaptationState.FOSSILIZED for adaptation in request.adaptations)
    culled = request.forgotten.culled
    culled += sum(adaptation.state is AdaptationState.CULLED for adaptation in request.adaptations)
    budget = request.tamiyo.max_adaptations
    train, val = report.metrics.train_loss, report.metrics.val_loss
    structure = {
        "progress": min(1.0, report.step / total),
        "log_train_loss": _signed_log(train),
        "log_val_loss": _signed_log(val),
        "budget_left": _share(max(0, budget - ordered), budget),
        "kept_share": _share(kept, ordered),
        "culled_share": _share(culled, ordered),
        "log_sites": math.log1p(len(report.graph.nodes)),
    }
    points = losses(request)
    window = improvement_window(request.max_epochs)
    measured = {
        "train_improvement": relative_improvement([point.train_loss for point in points], window),
        "val_improvement": relative_improvement([point.val_loss for point in points], window),
        "val_to_train": val_to_train(points, window),
    }
    return (*(structure[name] for name in RUN_STRUCTURE), *_masked(measured, RUN_MEASURED))
