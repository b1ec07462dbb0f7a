"""The registry of blueprints: functions of a site and hyperparameters that return kernel IR.

A blueprint is a registered function; everything that lists, costs, builds or documents blueprints reads the
registry. No torch is imported: the strategist weighs blueprints by their cost. Besides the packaged ones it knows what
the entry points of the group `esper.blueprints` of installed distributions register when they are imported, what was
submitted as data (`sources`, asked for a name that nobody knows), and whatever else this process registers.
"""

import difflib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import NoReturn

from esper.contracts.assets import Blueprint
from esper.contracts.assets import Hyperparameters
from esper.contracts.assets import Scalar
from esper.contracts.assets import SiteContract
from esper.contracts.operational import LayerGraph
from esper.contracts.operational import SiteNode
from esper.errors import BlueprintError
from esper.runtime.tezzeret.blueprints import branches
from esper.runtime.tezzeret.blueprints import control
from esper.runtime.tezzeret.blueprints import convolutional
from esper.runtime.tezzeret.blueprints import depth
from esper.runtime.tezzeret.blueprints import gates
from esper.runtime.tezzeret.blueprints import heads
from esper.runtime.tezzeret.blueprints import pairs
from esper.runtime.tezzeret.blueprints import sources
from esper.runtime.tezzeret.blueprints.documents import learn
from esper.runtime.tezzeret.blueprints.parts import CONVOLUTIONS
from esper.runtime.tezzeret.blueprints.parts import graph
from esper.runtime.tezzeret.blueprints.parts import host_convolution
from esper.runtime.tezzeret.blueprints.parts import linear
from esper.runtime.tezzeret.blueprints.registering import ANY_KIND
from esper.runtime.tezzeret.blueprints.registering import TABLE
from esper.runtime.tezzeret.blueprints.registering import Registered
from esper.runtime.tezzeret.blueprints.registering import register_blueprint
from esper.runtime.tezzeret.ir import INPUT
from esper.runtime.tezzeret.ir import KernelGraph
from esper.runtime.tezzeret.ir import TypedGraph
from esper.runtime.tezzeret.ir import check_graph
from esper.runtime.tezzeret.ir import shown
from esper.runtime.tezzeret.operations.elementwise import ACTIVATIONS

__all__ = [
    "PACKAGED",
    "cost",
    "fitted_contract",
    "get_blueprint",
    "host_graph",
    "kernel_graph",
    "list_blueprints",
    "register_blueprint",
    "registered",
    "resolve_hyperparameters",
    "site_contract_for",
]

PACKAGED = (branches, pairs, depth, convolutional, gates, heads, control)
"""The modules whose blueprints come with Esper: importing them has registered them."""

ENTRY_POINTS = "esper.blueprints"
DTYPES = ("float32", "float64", "bfloat16", "float16")
MAX_WIDTH = 65536
"""The largest rank or number of units of one kernel; the parameter budget is the tighter limit in practice."""


def list_blueprints() -> tuple[Blueprint, ...]:
    """All registered blueprints, by name. Raises BlueprintError ESP-421 when an installed one cannot be loaded."""
    _load_installed()
    return tuple(TABLE[name].blueprint for name in sorted(TABLE))


def get_blueprint(name: str) -> Blueprint:
    """The blueprint of that name. Raises BlueprintError ESP-421 with near names."""
    return registered(name).blueprint


def resolve_hyperparameters(name: str, site: SiteContract, given: Mapping[str, Scalar]) -> Hyperparameters:
    """The defaults for this site with `given` put over them. Raises BlueprintError ESP-421 (unknown blueprint),
    ESP-422 (unknown hyperparameter with near names, wrong type, out of range)."""
    entry = registered(name)
    resolved: Hyperparameters = entry.blueprint.defaults | entry.site_defaults(site)
    for key, value in given.items():
        if key not in resolved:
            near = difflib.get_close_matches(key, resolved, n=1)
            known = f"known are {', '.join(resolved)}" if resolved else "it takes none"
            hint = f"did you mean '{near[0]}'?" if near else known
            _refuse("ESP-422", f"blueprint '{name}': unknown hyperparameter {shown(key)}", hint=hint)
        _check_hyperparameter(name, key, value, resolved[key])
        resolved[key] = value
    return resolved


def site_contract_for(blueprint_name: str, node: SiteNode, graph: LayerGraph) -> SiteContract | None:
    """The contract of a kernel of this blueprint at this site of this model, or None where it does not fit
    (`fitted_contract` says why). Raises BlueprintError ESP-421 for an unknown blueprint."""
    found = fitted_contract(blueprint_name, node, graph)
    return None if isinstance(found, str) else found


def fitted_contract(blueprint_name: str, node: SiteNode, graph: LayerGraph) -> SiteContract | str:
    """The contract of a kernel of this blueprint at this site of this model, or why it does not fit. What fits has
    a graph with its default hyperparameters.

    A blueprint that reads the output gets a contract whose `input_shape` is the output's. For one that spans a pair,
    the contract reads the first layer's input and adds to the second one's output (`output_site`);
    `attributes["width"]` is then the width between the two and, for convolutions, `attributes["pair_output"]` the
    second one's geometry. Raises BlueprintError ESP-421 for an unknown blueprint.
    """
    entry = registered(blueprint_name)
    contract = node.contract
    if entry.reads == "output":
        contract = contract.model_copy(update={"reads": "output", "input_shape": contract.output_shape})
    elif entry.spans_pair:
        second = next((n.contract for n in graph.nodes if n.contract.site == node.widen_output), None)
        if second is None:
            return "no second layer is known that alone reads its units"
        if second.kind != contract.kind or second.dtype != contract.dtype:
            return f"it is {contract.kind} in {contract.dtype}, the second layer {second.kind} in {second.dtype}"
        contract = _pair_contract(contract, second)
    misfit = _misfit(entry, contract)
    if misfit is not None:
        return misfit
    try:
        kernel_graph(blueprint_name, contract, {})
    except BlueprintError as error:
        # The kind is right and the geometry is not: one channel to normalise, padding wider than the image.
        return error.message
    return contract


def kernel_graph(
    name: str,
    contract: SiteContract,
    hyperparameters: Mapping[str, Scalar],
    *,
    max_parameters: int | None = None,
    max_flops: int | None = None,
) -> KernelGraph:
    """The checked IR of one kernel. Missing hyperparameters take their defaults.

    Raises BlueprintError: ESP-421 unknown blueprint, ESP-422 hyperparameters, ESP-423 the site does not take this
    blueprint, ESP-410..418 from the graph itself (416: it is over a budget that was given), ESP-414 when the graph's
    output is not the site's.
    """
    return _typed_graph(name, contract, hyperparameters, max_parameters, max_flops).graph


def cost(name: str, contract: SiteContract, hyperparameters: Mapping[str, Scalar]) -> tuple[int, int]:
    """(parameters, floating point operations of one sample forward) that the kernel would add."""
    typed = _typed_graph(name, contract, hyperparameters)
    return typed.parameter_count, typed.flops_per_sample


def _typed_graph(
    name: str,
    contract: SiteContract,
    hyperparameters: Mapping[str, Scalar],
    max_parameters: int | None = None,
    max_flops: int | None = None,
) -> TypedGraph:
    entry = registered(name)
    misfit = _misfit(entry, contract)
    if misfit is not None:
        _refuse("ESP-423", f"blueprint '{name}' does not fit site '{contract.site}': {misfit}")
    made = entry.function(contract, resolve_hyperparameters(name, contract, hyperparameters))
    typed = check_graph(made, max_parameters=max_parameters, max_flops=max_flops)
    if typed.input_shape != contract.input_shape:
        _refuse("ESP-414", f"graph: reads {typed.input_shape}, site '{contract.site}' has {contract.input_shape}")
    if typed.output_shape != contract.output_shape:
        _refuse(
            "ESP-414",
            f"node '{made.outputs[0]}': gives {typed.output_shape} for site '{contract.site}', "
            f"'{contract.output_site}' needs {contract.output_shape}",
        )
    return typed


def host_graph(contract: SiteContract) -> KernelGraph:
    """A plain layer of the host's kind and geometry, of one group, from the site's input to its output's channels:
    what a certificate compares a kernel's cost and drift with. For a pair it is the one layer across both.

    Raises BlueprintError ESP-423 for a kind of host that has no geometry.
    """
    if contract.kind == "linear":
        return graph(contract, linear("host", INPUT, contract.output_shape[-1], bias=False))
    if contract.kind in CONVOLUTIONS:
        axes = len(contract.input_shape) - 1
        return graph(
            contract, host_convolution("host", INPUT, axes, contract.attributes, contract.output_shape[0], bias=False)
        )
    _refuse("ESP-423", f"site '{contract.site}': unknown kind of host '{contract.kind}'")


@cache
def _load_installed() -> None:
    """Import what installed distributions name. Only names from the metadata of installed distributions are ever
    imported, never one out of a configuration, a history or an artifact."""
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:  # a stranger's module may raise anything
            raise BlueprintError(
                "ESP-421",
                f"entry point '{entry.name}' of '{ENTRY_POINTS}' ({entry.value}) cannot be loaded: "
                f"{type(error).__name__}: {error}",
                hint="mend or uninstall the distribution that names it",
            ) from error


def registered(name: str) -> Registered:
    """All that is known of a blueprint. Raises BlueprintError ESP-421 with near names."""
    _load_installed()
    if name not in TABLE:
        for source in sources.SOURCES:
            for blueprint in source():
                learn(blueprint)
    entry = TABLE.get(name)
    if entry is None:
        near = difflib.get_close_matches(str(name), TABLE, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(sorted(TABLE))}"
        _refuse("ESP-421", f"unknown blueprint {shown(name)}", hint=hint)
    return entry


def _pair_contract(first: SiteContract, second: SiteContract) -> SiteContract:
    attributes = dict(first.attributes)
    if first.kind in CONVOLUTIONS:
        geometry = {name: value for name, value in second.attributes.items() if not name.startswith("pair_")}
        attributes |= {"width": first.output_shape[0], "pair_output": geometry}
    else:
        attributes |= {"width": first.output_shape[-1]}
    return SiteContract(
        site=first.site,
        output_site=second.site,
        kind=first.kind,
        input_shape=first.input_shape,
        output_shape=second.output_shape,
        dtype=first.dtype,
        attributes=attributes,
    )


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


def _misfit(entry: Registered, contract: SiteContract) -> str | None:
    """Why a contract does not take a blueprint; None when it does."""
    kinds = entry.blueprint.host_kinds
    if kinds != (ANY_KIND,) and contract.kind not in kinds:
        return f"its kind is '{contract.kind}', the blueprint is for {', '.join(kinds)}"
    if contract.dtype not in DTYPES:
        return f"its dtype is '{contract.dtype}', a kernel trains in {', '.join(DTYPES)}"
    if contract.reads != entry.reads:
        return f"the contract reads the {contract.reads}, the blueprint the {entry.reads}"
    if contract.reads == "output" and contract.input_shape != contract.output_shape:
        return f"it reads the output, but {contract.input_shape} is not {contract.output_shape}"
    if entry.spans_pair == (contract.output_site == contract.site):
        return "the blueprint needs a pair of sites" if entry.spans_pair else "the blueprint needs one site, not a pair"
    if contract.kind == "linear" and contract.input_shape[:-1] != contract.output_shape[:-1]:
        return f"its input {contract.input_shape} and output {contract.output_shape} differ before the last dimension"
    return entry.fits(contract)


def _refuse(code: str, message: str, *, hint: str | None = None) -> NoReturn:
    raise BlueprintError(code, message, hint=hint)
