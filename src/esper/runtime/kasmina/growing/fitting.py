"""Whether a kernel fits its site: the contract that it is built for, the layers that it finds, its measured birth."""

import math

import torch
from torch import nn

from esper.contracts.assets import SiteContract
from esper.contracts.operational import LayerGraph
from esper.contracts.operational import SiteNode
from esper.errors import GrowthError
from esper.runtime.kasmina.bank import kernel_parts
from esper.runtime.kasmina.growing.fold import pair_obstacle
from esper.runtime.kasmina.growing.pairs import traced_pairs
from esper.runtime.kasmina.layer import SiteState
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.lineage import with_pair
from esper.runtime.kasmina.wrapping.morphable import model_state
from esper.runtime.kasmina.wrapping.morphable import site_named
from esper.runtime.kasmina.wrapping.morphable import sites_of
from esper.runtime.tezzeret.blueprints import get_blueprint
from esper.runtime.tezzeret.blueprints import site_contract_for
from esper.runtime.tezzeret.build import KernelModule

BIRTH_SAMPLES = 2


def site_contract(model: nn.Module, site: str, blueprint: str) -> SiteContract:
    """The contract of a kernel of this blueprint here. Raises GrowthError ESP-432, ESP-434."""
    module = site_named(model, site)
    contract = state_of(module).contract(module)
    if contract is None:
        raise GrowthError(
            "ESP-432",
            f"'{site}' has not been called yet, so it is not known that anything grown there would run",
            hint="run the model once, or wrap it with example_inputs=",
        )
    nodes = {}
    graph = model_state(model).graph
    known = {n.contract.site: n for n in graph.nodes} if graph is not None else {}
    traced = {} if graph is not None else traced_pairs(model) or {}
    for name, layer in sites_of(model).items():
        own = state_of(layer).contract(layer)
        if own is None:
            continue
        second, activation = None, None
        if name in known:
            second = known[name].widen_output
            activation = known[name].contract.attributes.get("pair_activation")
        elif name in traced:
            second, activation = traced[name]
        if second is not None:
            own = with_pair(own, str(activation))
        nodes[name] = SiteNode(
            contract=own, parameter_count=0, flops_per_sample=0, depth=0, widen_output=second, seeds=()
        )
    node = nodes[state_of(module).name]
    found = site_contract_for(blueprint, node, LayerGraph(nodes=tuple(nodes.values()), edges=()))
    if found is None:
        kinds = ", ".join(get_blueprint(blueprint).host_kinds)
        raise GrowthError(
            "ESP-434",
            f"blueprint '{blueprint}' does not fit '{site}' ({contract.kind})",
            hint=f"it is for {kinds}; one that spans a pair needs Linear -> activation -> Linear whose hidden units "
            "nothing else reads (wrap with example_inputs= where tracing cannot see it)",
        )
    if found.output_site != found.site:
        obstacle = pair_obstacle(model, module, sites_of(model)[found.output_site])
        if obstacle is not None:
            raise GrowthError(
                "ESP-434", f"no units can be added between '{site}' and '{found.output_site}': {obstacle}"
            )
    return found


def fitting_target(model: nn.Module, module: nn.Module, kernel: KernelModule) -> nn.Module:
    """The layer that the kernel adds to. Raises GrowthError ESP-432, ESP-434."""
    state = state_of(module)
    wanted = kernel.manifest.site
    target = module if wanted.output_site == wanted.site else site_named(model, wanted.output_site)
    reads, adds = state.contract(module), state_of(target).contract(target)
    if reads is None or adds is None:
        name = state.name if reads is None else state_of(target).name
        raise GrowthError(
            "ESP-432", f"'{name}' has not been called yet", hint="run the model once, or wrap with example_inputs="
        )
    for what, theirs, ours in (
        ("kind", wanted.kind, reads.kind),
        ("dtype", wanted.dtype, reads.dtype),
        ("input shape", wanted.input_shape, reads.input_shape),
        ("output shape", wanted.output_shape, adds.output_shape),
    ):
        if theirs != ours:
            raise GrowthError("ESP-434", f"the kernel does not fit '{state.name}': {what} is {ours}, it needs {theirs}")
    if target is not module:
        obstacle = pair_obstacle(model, module, target)
        if obstacle is not None:
            raise GrowthError(
                "ESP-434", f"no units can be added between '{state.name}' and '{wanted.output_site}': {obstacle}"
            )
        if kernel_parts(kernel) is None:
            raise GrowthError("ESP-434", "a kernel across two layers must be of the form up(act(down(x)))")
    return target


def measured_birth(kernel: KernelModule, state: SiteState, target: SiteState) -> float:
    """The largest absolute output on a seeded batch. Raises GrowthError ESP-434 when its shape is not the site's."""
    assert state.input_shape is not None
    generator = torch.Generator().manual_seed(0)
    parameter = next(kernel.parameters())
    x = torch.randn((BIRTH_SAMPLES, *state.input_shape), generator=generator).to(parameter.device, parameter.dtype)
    with torch.no_grad():
        delta = kernel(x)
    expected = (BIRTH_SAMPLES, *(target.output_shape or ()))
    if tuple(delta.shape) != expected:
        raise GrowthError("ESP-434", f"the kernel gives {tuple(delta.shape)}, '{target.name}' needs {expected}")
    largest = float(delta.abs().max())
    if not math.isfinite(largest):
        raise GrowthError("ESP-435", f"the output of the kernel for '{state.name}' is not finite")
    return largest
