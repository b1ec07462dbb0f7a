"""What the health of the sites says for growing where: the evidence for each (site, blueprint) pair, and its rank.

Shared by `esper.suggest` and by the policies of a run. Nothing here needs torch.
"""

import math
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass

from esper.contracts.assets import SiteContract
from esper.contracts.base import SiteName
from esper.contracts.enums import SeedState
from esper.contracts.operational import HealthSignal
from esper.contracts.operational import LayerGraph
from esper.contracts.operational import SiteNode
from esper.runtime.tezzeret.blueprints.registry import cost
from esper.runtime.tezzeret.blueprints.registry import site_contract_for

PAIR_SATURATION = "pair_saturation"
RESIDUAL_PULL = "residual_pull"

EVIDENCE = {"widen": PAIR_SATURATION}
"""What speaks for a blueprint, where it is not `GENERAL_EVIDENCE`. A narrow layer uses all of its few directions, and
says so by its saturation; the residual gradient never found the planted one."""
GENERAL_EVIDENCE = RESIDUAL_PULL
"""Speaks for every blueprint that adds capacity beside one layer: what the layer's own input cannot explain
linearly, a non-linear branch on that input might. Its bare share of the gradient's energy
(`HealthSignal.residual_gradient`) is 0.8 to 1.0 everywhere once a layer has learned, and ranks nothing."""

GROWN = (SeedState.TRAINING, SeedState.GRAFTING, SeedState.FOSSILIZED)

_MATRICES = ("linear", "conv1d", "conv2d")
"""Forms whose pulls are measured against each other: the product of a residual and a matrix's norm."""
_FOLLOWED = (*_MATRICES, "attention", "block")
"""Forms that have a pull at all. A table of vectors is every function of its ids already, and the weights of a norm
are no matrix that its input goes through."""


@dataclass(frozen=True)
class Threshold:
    """A number and the sentence that defends it."""

    value: float
    source: str


EVIDENCE_THRESHOLDS: dict[str, Threshold] = {
    PAIR_SATURATION: Threshold(
        0.87,
        "Calibration: the planted layer of width 2 has 0.89 to 0.99 in all of 5 seeds and widening it gains 48 to 64 % "
        "of the loss; the other layers of that model stay below 0.84 and gain 0 to 7 %. In 22 of 24 states of all "
        "models the layer with the highest saturation was the best to widen.",
    ),
    RESIDUAL_PULL: Threshold(
        0.30,
        "Calibration: where nothing is planted the strongest pull marks the best bottleneck or one close to it (gain "
        "after the hold .29 of .31 in digits, .24 of .30 in digits-cnn, .42 of .42 in a wide teacher student); digits "
        "layers below 0.3 gained half as much, and some ended worse. In the planted teacher it marks weak ones (.05 of "
        ".12): there the saturation decides.",
    ),
}
"""From which score on a pair may be grown. "Calibration" is a study in plain PyTorch: digits, digits-cnn and teacher
with 5 seeds each, two states of every run, every (site, blueprint) pair grown from one snapshot on the same batches
and compared with its twin after the hold and at the end; beside them the same tasks with large enough hosts."""


def channels(contract: SiteContract) -> int:
    """Channels of the output of a site."""
    shape = contract.output_shape or (1,)
    axis = contract.attributes.get("channel_axis", "first" if contract.kind.startswith("conv") else "last")
    return shape[0] if axis == "first" else shape[-1]


def signals_by_site(health: Sequence[HealthSignal]) -> dict[SiteName, HealthSignal]:
    """One signal per site: that of the lowest seed, which is the one of the host layer itself."""
    signals: dict[SiteName, HealthSignal] = {}
    for signal in sorted(health, key=lambda signal: signal.seed, reverse=True):
        signals[signal.site] = signal
    return signals


def pull(node: SiteNode, signal: HealthSignal | None) -> float | None:
    """How strongly the loss pulls at this site where its own input cannot follow; up to a factor that all sites
    of one probe share.

    The residual gradient's norm per row x sqrt(rows of one sample) x norm of the host's weights: the change of the
    loss for one sample per relative change of the layer, in the direction that its input cannot explain.
    """
    if signal is None or signal.rows_seen == 0 or node.contract.kind not in _FOLLOWED:
        return None
    norm, gradient, relative = signal.residual_gradient_norm, signal.gradient_norm, signal.gradient_to_weight
    if norm is None or gradient is None or not relative:
        return None
    places = math.prod(node.contract.output_shape) / channels(node.contract)
    found = norm * math.sqrt(places / signal.rows_seen) * (gradient / relative)
    return found if math.isfinite(found) else None


def strongest_pull(graph: LayerGraph, signals: Mapping[SiteName, HealthSignal]) -> float:
    """The largest pull at a linear layer or convolution of the model; at any site where there are none."""
    found = [(node.contract.kind, pull(node, signals.get(node.contract.site)) or 0.0) for node in graph.nodes]
    return max([each for kind, each in found if kind in _MATRICES] or [each for _, each in found], default=0.0)


def residual_pull(node: SiteNode, signal: HealthSignal | None, strongest: float) -> float | None:
    """The share of the gradient's energy that the site's own input cannot explain, times the site's pull relative to
    the strongest one. 0 to 1."""
    own = pull(node, signal)
    if own is None or signal is None or signal.residual_gradient is None:
        return None
    return signal.residual_gradient * (min(1.0, own / strongest) if strongest > 0 else 0.0)


def widened_share(node: SiteNode, graph: LayerGraph) -> float:
    """Units that `widen` put beside the layer over all units, the layer's own included."""
    grown = [seed for seed in node.seeds if seed.blueprint == "widen" and seed.state in GROWN]
    contract = site_contract_for("widen", node, graph) if grown else None
    if contract is None:
        return 0.0
    one, two = (cost("widen", contract, {"units": units})[0] for units in (1, 2))
    each = two - one
    units = sum(max(0.0, (seed.parameters - (one - each)) / each) for seed in grown)
    return units / (units + channels(node.contract))


def pair_saturation(signal: HealthSignal | None, widened: float) -> float | None:
    """The saturation of the layer together with the units that `widen` has put beside it, which the probe does not
    see: they count as unused."""
    if signal is None or signal.rows_seen == 0 or signal.saturation is None:
        return None
    return signal.saturation * (1.0 - widened)


def evidence_for(blueprint: str) -> str:
    """The name of what speaks for a blueprint."""
    return EVIDENCE.get(blueprint, GENERAL_EVIDENCE)


def told(feature: str, score: float, limit: float) -> str:
    """The evidence as a reason."""
    relation = "reaches" if score >= limit else "is below"
    return f"{feature} {score:.3f} {relation} {limit:.3f}"


def rank(
    *, convincing: bool, eligible: bool, blueprint: str, strength: float, flops: int, parameters: int
) -> tuple[bool, bool, bool, float, int, int]:
    """What pairs are sorted by, strongest first.

    Convincing pairs come first, among them those with evidence of their own: a narrow layer loses what it cannot
    carry for everything behind it, so it is repaired before anything is put beside other layers. Then `strength`, the
    score relative to its threshold, decides; ties go to the cheaper pair.
    """
    return (not convincing, not eligible, convincing and blueprint not in EVIDENCE, -strength, flops, parameters)
