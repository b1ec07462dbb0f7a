"""More units between two layers: `widen`."""

from collections.abc import Mapping

from pydantic import JsonValue

from esper.contracts.assets import Hyperparameters
from esper.contracts.assets import SiteContract
from esper.runtime.tezzeret.blueprints.parts import CONVOLUTIONS
from esper.runtime.tezzeret.blueprints.parts import activation
from esper.runtime.tezzeret.blueprints.parts import channels
from esper.runtime.tezzeret.blueprints.parts import graph
from esper.runtime.tezzeret.blueprints.parts import host_convolution
from esper.runtime.tezzeret.blueprints.parts import linear
from esper.runtime.tezzeret.blueprints.parts import width
from esper.runtime.tezzeret.blueprints.registering import register_blueprint
from esper.runtime.tezzeret.ir import INPUT
from esper.runtime.tezzeret.ir import KernelGraph
from esper.runtime.tezzeret.ir import KernelNode
from esper.runtime.tezzeret.operations.elementwise import ACTIVATIONS

FEWEST_UNITS = 10

_NODE_IDS = {"activation": "act", "batch_norm": "norm", "max_pool2d": "pool", "avg_pool2d": "pool"}
"""What may stand between the two layers: operations that keep every unit to itself. A norm over units would make the
old ones depend on the new."""


def _between(site: SiteContract) -> list[Mapping[str, JsonValue]]:
    given = site.attributes.get("pair_between")
    if isinstance(given, list):
        return [part for part in given if isinstance(part, dict)]
    return [{"op": "activation", "name": _pair_activation(site)}]


def _pair_activation(site: SiteContract) -> str:
    given = site.attributes.get("pair_activation")
    return given if isinstance(given, str) and given in ACTIVATIONS else "relu"


def _defaults(site: SiteContract) -> Hyperparameters:
    units = site.attributes.get("width")
    return {
        "units": max(FEWEST_UNITS, units) if isinstance(units, int) else FEWEST_UNITS,
        "activation": _pair_activation(site),
    }


def _misfit(site: SiteContract) -> str | None:
    between = _between(site)
    for part in between:
        if part.get("op") not in _NODE_IDS:
            return f"{part.get('op')} stands between the two layers, and it would mix new units with old ones"
    activations = [part for part in between if part.get("op") == "activation"]
    if len(activations) != 1:
        return f"{len(activations)} activations stand between the two layers, there must be one"
    second = site.attributes.get("pair_output")
    for which, geometry in (("first", site.attributes), ("second", second if isinstance(second, dict) else {})):
        if geometry.get("groups", 1) != 1:
            return f"the {which} layer has groups, which new units cannot join"
    return None


@register_blueprint(
    "widen",
    description="More units between a layer and the next of its kind, across what stands between them: repairs a "
    "narrow layer. As many units as the layer has, 10 at least; the activation is the pair's own. Between the two may "
    "stand one activation, batch norms and pools.",
    formula="y2 += B act(A x1 + a)",
    host_kinds=("linear", *CONVOLUTIONS),
    defaults={"units": FEWEST_UNITS, "activation": "relu"},
    site_defaults=_defaults,
    fits=_misfit,
    spans_pair=True,
)
def widen(site: SiteContract, hyperparameters: Hyperparameters) -> KernelGraph:
    """New hidden units with zero outgoing weights (the function-preserving half of Net2Net, arXiv 1511.05641)."""
    units, axes = width(hyperparameters["units"]), len(site.input_shape) - 1
    convolutional = site.kind in CONVOLUTIONS
    if convolutional:
        nodes = [host_convolution("down", INPUT, axes, site.attributes, units, bias=True)]
    else:
        nodes = [linear("down", INPUT, units, bias=True)]
    for part in _between(site):
        op = str(part["op"])
        same = sum(_NODE_IDS.get(node.op) == _NODE_IDS[op] for node in nodes)
        node_id = _NODE_IDS[op] if not same else f"{_NODE_IDS[op]}{same + 1}"
        if op == "activation":
            nodes.append(activation(node_id, nodes[-1].id, hyperparameters["activation"]))
        else:
            attributes = {name: value for name, value in part.items() if name != "op"}
            nodes.append(KernelNode(id=node_id, op=op, inputs=(nodes[-1].id,), attributes=attributes))
    if convolutional:
        second = site.attributes.get("pair_output")
        geometry = second if isinstance(second, dict) else {}
        nodes.append(host_convolution("up", nodes[-1].id, axes, geometry, channels(site)))
    else:
        nodes.append(linear("up", nodes[-1].id, channels(site), bias=False))
    return graph(site, *nodes)
