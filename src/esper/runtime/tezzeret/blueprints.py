"""The registry of blueprints: functions of a site and hyperparameters that return kernel IR.

A blueprint is a registered function; everything that lists, costs, builds or documents blueprints reads the
registry. No torch is imported: the strategist weighs blueprints by their cost.
"""

import difflib
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from pydantic import JsonValue

from esper.contracts.assets import Blueprint
from esper.contracts.assets import Hyperparameters
from esper.contracts.assets import Scalar
from esper.contracts.assets import SiteContract
from esper.contracts.operational import LayerGraph
from esper.contracts.operational import SiteNode
from esper.errors import BlueprintError
from esper.runtime.tezzeret.ir import INPUT
from esper.runtime.tezzeret.ir import KernelGraph
from esper.runtime.tezzeret.ir import KernelNode
from esper.runtime.tezzeret.ir import check_graph
from esper.runtime.tezzeret.ir import shown
from esper.runtime.tezzeret.operations import ACTIVATIONS

DTYPES = ("float32", "float64", "bfloat16", "float16")
MAX_WIDTH = 65536
"""The largest rank or number of units of one kernel; the parameter budget is the tighter limit in practice."""

BlueprintFunction = Callable[[SiteContract, Hyperparameters], KernelGraph]
DefaultsRule = Callable[[SiteContract], Hyperparameters]


@dataclass(frozen=True)
class _Registered:
    blueprint: Blueprint
    function: BlueprintFunction
    site_defaults: DefaultsRule
    spans_pair: bool


_REGISTRY: dict[str, _Registered] = {}


def register_blueprint(
    name: str,
    *,
    description: str,
    formula: str,
    host_kinds: Iterable[str],
    defaults: Hyperparameters,
    site_defaults: DefaultsRule = lambda site: {},
    version: int = 1,
    capacity_free: bool = False,
    spans_pair: bool = False,
) -> Callable[[BlueprintFunction], BlueprintFunction]:
    """Register a function as a blueprint. `site_defaults(site)` overrides `defaults` where they depend on the
    site; `spans_pair` says that the kernel reads a site and adds to the next one (`SiteNode.widen_output`).
    Raises BlueprintError ESP-421 when the name is taken."""
    blueprint = Blueprint(
        name=name,
        version=version,
        description=description,
        formula=formula,
        host_kinds=tuple(host_kinds),
        defaults=dict(defaults),
        capacity_free=capacity_free,
    )

    def register(function: BlueprintFunction) -> BlueprintFunction:
        if name in _REGISTRY:
            _refuse("ESP-421", f"blueprint '{name}' is registered already")
        _REGISTRY[name] = _Registered(blueprint, function, site_defaults, spans_pair)
        return function

    return register


def list_blueprints() -> tuple[Blueprint, ...]:
    """All registered blueprints, by name."""
    return tuple(_REGISTRY[name].blueprint for name in sorted(_REGISTRY))


def get_blueprint(name: str) -> Blueprint:
    """The blueprint of that name. Raises BlueprintError ESP-421 with near names."""
    return _registered(name).blueprint


def resolve_hyperparameters(name: str, site: SiteContract, given: Mapping[str, Scalar]) -> Hyperparameters:
    """The defaults for this site with `given` put over them. Raises BlueprintError ESP-421 (unknown blueprint),
    ESP-422 (unknown hyperparameter with near names, wrong type, out of range)."""
    entry = _registered(name)
    resolved: Hyperparameters = entry.blueprint.defaults | entry.site_defaults(site)
    for key, value in given.items():
        if key not in resolved:
            near = difflib.get_close_matches(key, resolved, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(resolved)}"
            _refuse("ESP-422", f"blueprint '{name}': unknown hyperparameter {shown(key)}", hint=hint)
        _check_hyperparameter(name, key, value, resolved[key])
        resolved[key] = value
    return resolved


def site_contract_for(blueprint_name: str, node: SiteNode, graph: LayerGraph) -> SiteContract | None:
    """The contract of a kernel of this blueprint at this site of this model, or None where it does not fit.

    For a blueprint that spans a pair, the contract reads the first layer's input and adds to the second one's
    output (`output_site`); `attributes["width"]` is then the width between the two.
    Raises BlueprintError ESP-421 for an unknown blueprint.
    """
    entry = _registered(blueprint_name)
    contract = node.contract
    if entry.spans_pair:
        second = next((n.contract for n in graph.nodes if n.contract.site == node.widen_output), None)
        if second is None or second.kind != contract.kind or second.dtype != contract.dtype:
            return None
        contract = SiteContract(
            site=contract.site,
            output_site=second.site,
            kind=contract.kind,
            input_shape=contract.input_shape,
            output_shape=second.output_shape,
            dtype=contract.dtype,
            attributes={**contract.attributes, "width": contract.output_shape[-1]},
        )
    return contract if _misfit(entry, contract) is None else None


def kernel_graph(name: str, contract: SiteContract, hyperparameters: Mapping[str, Scalar]) -> KernelGraph:
    """The checked IR of one kernel. Missing hyperparameters take their defaults.

    Raises BlueprintError: ESP-421 unknown blueprint, ESP-422 hyperparameters, ESP-423 the site does not take this
    blueprint, ESP-410..418 from the graph itself, ESP-414 when the graph's output is not the site's.
    """
    entry = _registered(name)
    misfit = _misfit(entry, contract)
    if misfit is not None:
        _refuse("ESP-423", f"blueprint '{name}' does not fit site '{contract.site}': {misfit}")
    graph = entry.function(contract, resolve_hyperparameters(name, contract, hyperparameters))
    produced = check_graph(graph).output_shape
    if produced != contract.output_shape:
        _refuse(
            "ESP-414",
            f"node '{graph.outputs[0]}': gives {produced} for site '{contract.site}', "
            f"'{contract.output_site}' needs {contract.output_shape}",
        )
    return graph


def cost(name: str, contract: SiteContract, hyperparameters: Mapping[str, Scalar]) -> tuple[int, int]:
    """(parameters, floating point operations of one sample forward) that the kernel would add."""
    typed = check_graph(kernel_graph(name, contract, hyperparameters))
    return typed.parameter_count, typed.flops_per_sample


def host_graph(contract: SiteContract) -> KernelGraph:
    """A plain layer of the host's kind and geometry from the site's input to its output: what a certificate
    compares a kernel's cost and drift with. For a pair it is the one layer across both.

    Raises BlueprintError ESP-423 for a kind of host that is not known.
    """
    if contract.kind == "linear":
        node = _linear("host", INPUT, contract.output_shape[-1], bias=False)
    elif contract.kind == "conv2d":
        node = _host_conv2d("host", contract, contract.output_shape[0], bias=False)
    else:
        _refuse("ESP-423", f"site '{contract.site}': unknown kind of host '{contract.kind}'")
    return KernelGraph(inputs={INPUT: contract.input_shape}, nodes=(node,), outputs=("host",))


def _registered(name: str) -> _Registered:
    entry = _REGISTRY.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, _REGISTRY, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(sorted(_REGISTRY))}"
        _refuse("ESP-421", f"unknown blueprint {shown(name)}", hint=hint)
    return entry


def _check_hyperparameter(name: str, key: str, value: Scalar, default: Scalar) -> None:
    where = f"blueprint '{name}': {key}"
    if key == "activation":
        if value not in ACTIVATIONS:
            near = difflib.get_close_matches(str(value), ACTIVATIONS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(ACTIVATIONS)}"
            _refuse("ESP-422", f"{where}: unknown activation {value!r}", hint=hint)
        return
    if type(value) is not type(default):
        _refuse("ESP-422", f"{where}: {value!r} is {type(value).__name__}, must be {type(default).__name__}")
    if isinstance(value, int) and not isinstance(value, bool) and not 1 <= value <= MAX_WIDTH:
        _refuse("ESP-422", f"{where}: {value} is not in 1 to {MAX_WIDTH}")


def _misfit(entry: _Registered, contract: SiteContract) -> str | None:
    """Why a contract does not take a blueprint; None when it does."""
    kinds = entry.blueprint.host_kinds
    if contract.kind not in kinds:
        return f"its kind is '{contract.kind}', the blueprint is for {', '.join(kinds)}"
    if contract.dtype not in DTYPES:
        return f"its dtype is '{contract.dtype}', a kernel trains in {', '.join(DTYPES)}"
    if entry.spans_pair == (contract.output_site == contract.site):
        return "the blueprint needs a pair of sites" if entry.spans_pair else "the blueprint needs one site, not a pair"
    if contract.kind == "linear" and contract.input_shape[:-1] != contract.output_shape[:-1]:
        return f"its input {contract.input_shape} and output {contract.output_shape} differ before the last dimension"
    return None


def _linear(node_id: str, source: str, out_features: int, *, bias: bool) -> KernelNode:
    attributes: dict[str, JsonValue] = {"out_features": out_features, "bias": bias}
    return KernelNode(id=node_id, op="linear", inputs=(source,), attributes=attributes)


def _activation(node_id: str, source: str, name: Scalar) -> KernelNode:
    return KernelNode(id=node_id, op="activation", inputs=(source,), attributes={"name": name})


def _pair(value: JsonValue) -> JsonValue:
    return [value, value] if isinstance(value, int) else value


def _host_conv2d(node_id: str, contract: SiteContract, channels: int, *, bias: bool) -> KernelNode:
    """A convolution of the host's spatial geometry. Groups are not the host's: a kernel may mix what the host
    keeps apart."""
    given = contract.attributes
    attributes: dict[str, JsonValue] = {
        "out_channels": channels,
        "kernel_size": _pair(given.get("kernel_size", 1)),
        "stride": _pair(given.get("stride", 1)),
        "padding": _pair(given.get("padding", 0)),
        "dilation": _pair(given.get("dilation", 1)),
        "groups": 1,
        "padding_mode": given.get("padding_mode", "zeros"),
        "bias": bias,
    }
    return KernelNode(id=node_id, op="conv2d", inputs=(INPUT,), attributes=attributes)


def _pointwise(node_id: str, source: str, channels: int) -> KernelNode:
    attributes: dict[str, JsonValue] = {
        "out_channels": channels,
        "kernel_size": [1, 1],
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
        "groups": 1,
        "padding_mode": "zeros",
        "bias": False,
    }
    return KernelNode(id=node_id, op="conv2d", inputs=(source,), attributes=attributes)


def _graph(contract: SiteContract, width: Scalar, activation: Scalar | None) -> KernelGraph:
    """up(act(down(x))) with node ids `down`, `act`, `up`; `up` has no bias, so that zero weights mean zero."""
    assert isinstance(width, int)
    biased = activation is not None
    hidden = "act" if biased else "down"
    if contract.kind == "conv2d":
        down = _host_conv2d("down", contract, width, bias=biased)
        up = _pointwise("up", hidden, contract.output_shape[0])
    else:
        down = _linear("down", INPUT, width, bias=biased)
        up = _linear("up", hidden, contract.output_shape[-1], bias=False)
    nodes = (down, up) if activation is None else (down, _activation("act", "down", activation), up)
    return KernelGraph(inputs={INPUT: contract.input_shape}, nodes=nodes, outputs=("up",))


def _bottleneck_defaults(site: SiteContract) -> Hyperparameters:
    return {"rank": 16} if site.kind == "conv2d" else {}


def _widen_defaults(site: SiteContract) -> Hyperparameters:
    width = site.attributes.get("width")
    activation = site.attributes.get("pair_activation")
    return {
        "units": max(10, width) if isinstance(width, int) else 10,
        "activation": activation if isinstance(activation, str) and activation in ACTIVATIONS else "relu",
    }


@register_blueprint(
    "bottleneck",
    description="Non-linear capacity beside one layer. Rank 32 on linear, 16 on conv2d, where A has the host's "
    "kernel size, stride, padding and dilation and B is 1x1.",
    formula="y += B act(A x + a)",
    host_kinds=("linear", "conv2d"),
    defaults={"rank": 32, "activation": "relu"},
    site_defaults=_bottleneck_defaults,
)
def bottleneck(site: SiteContract, hyperparameters: Hyperparameters) -> KernelGraph:
    """The residual branch of growth-by-functional-gradient (TINY, arXiv 2405.19816; SENN, arXiv 2307.04526)."""
    return _graph(site, hyperparameters["rank"], hyperparameters["activation"])


@register_blueprint(
    "widen",
    description="More units between a linear layer and the next, across their activation: repairs a narrow layer. "
    "As many units as the layer has, 10 at least; the activation is the pair's own.",
    formula="y2 += B act(A x1 + a)",
    host_kinds=("linear",),
    defaults={"units": 10, "activation": "relu"},
    site_defaults=_widen_defaults,
    spans_pair=True,
)
def widen(site: SiteContract, hyperparameters: Hyperparameters) -> KernelGraph:
    """New hidden units with zero outgoing weights (the function-preserving half of Net2Net, arXiv 1511.05641)."""
    return _graph(site, hyperparameters["units"], hyperparameters["activation"])


@register_blueprint(
    "lowrank",
    description="The control: a full-rank trainable host gains no capacity from it; on a frozen host an adapter.",
    formula="y += B A x",
    host_kinds=("linear", "conv2d"),
    defaults={"rank": 8},
    capacity_free=True,
)
def lowrank(site: SiteContract, hyperparameters: Hyperparameters) -> KernelGraph:
    """Low-rank adaptation without its scale (LoRA, arXiv 2106.09685)."""
    return _graph(site, hyperparameters["rank"], None)


def _refuse(code: str, message: str, *, hint: str | None = None) -> NoReturn:
    raise BlueprintError(code, message, hint=hint)
