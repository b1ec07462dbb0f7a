"""Whether a kernel fits its site: the contract that it is built for, the layers that it finds, its measured birth."""

import math

import torch
from torch import nn

from esper.contracts.assets import SiteContract
from esper.contracts.operational import LayerGraph
from esper.contracts.operational import SiteNode
from esper.errors import BlueprintError
from esper.errors import GrowthError
from esper.runtime.kasmina.bank import floating_dtype
from esper.runtime.kasmina.growing.between import pair_norms
from esper.runtime.kasmina.growing.between import with_pair
from esper.runtime.kasmina.growing.folding.obstacles import pair_obstacle
from esper.runtime.kasmina.growing.pairs import known_pairs
from esper.runtime.kasmina.layer import SiteState
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.wrapping.hosts import kind_named
from esper.runtime.kasmina.wrapping.morphable import site_named
from esper.runtime.kasmina.wrapping.morphable import sites_of
from esper.runtime.kasmina.wrapping.undisturbed import undisturbed
from esper.runtime.tezzeret.blueprints.registry import fitted_contract
from esper.runtime.tezzeret.blueprints.registry import list_blueprints
from esper.runtime.tezzeret.blueprints.registry import registered
from esper.runtime.tezzeret.build import KernelModule
from esper.runtime.tezzeret.initialisers import HostWeights
from esper.runtime.tezzeret.ir import INPUT
from esper.runtime.tezzeret.ir import check_graph
from esper.runtime.tezzeret.module import TORCH_DTYPES

BIRTH_SAMPLES = 2


def site_contract(model: nn.Module, site: str, blueprint: str) -> SiteContract:
    """The contract of a kernel of this blueprint here. Raises GrowthError ESP-432, ESP-434."""
    module = site_named(model, site)
    contract = state_of(module).contract(module)
    if contract is None:
        raise _not_proven(state_of(module))
    nodes = {}
    found_pairs = known_pairs(model)
    for name, layer in sites_of(model).items():
        own = state_of(layer).contract(layer)
        if own is None:
            continue
        pair = found_pairs.pairs.get(name)
        if pair is not None:
            own = with_pair(own, pair)
        nodes[name] = SiteNode(
            contract=own,
            parameter_count=0,
            flops_per_sample=0,
            depth=0,
            widen_output=None if pair is None else pair.second,
            seeds=(),
        )
    node = nodes[state_of(module).name]
    graph = LayerGraph(nodes=tuple(nodes.values()), edges=())
    found = fitted_contract(blueprint, node, graph)
    if isinstance(found, str):
        spans_pair = registered(blueprint).spans_pair
        refusal = found_pairs.refusals.get(state_of(module).name) if spans_pair else None
        others = [b.name for b in list_blueprints() if not isinstance(fitted_contract(b.name, node, graph), str)]
        unseen = "; a pair must be seen: wrap with example_inputs=" if spans_pair and refusal is None else ""
        raise GrowthError(
            "ESP-434",
            f"blueprint '{blueprint}' does not fit '{site}' ({contract.kind}): {refusal or found}",
            hint=f"what fits there: {', '.join(others)}{unseen}",
        )
    if found.output_site != found.site:
        obstacle = pair_obstacle(model, module, sites_of(model)[found.output_site], pair_norms(found))
        if obstacle is not None:
            raise GrowthError(
                "ESP-434", f"no units can be added between '{site}' and '{found.output_site}': {obstacle}"
            )
    return found


def fitting_target(
    model: nn.Module, module: nn.Module, kernel: KernelModule
) -> tuple[nn.Module, SiteContract, SiteContract]:
    """The module that the kernel adds to, and the contracts of the two sites that it reads at and adds to.
    Raises GrowthError ESP-432, ESP-434."""
    state = state_of(module)
    wanted = kernel.manifest.site
    target = module if wanted.output_site == wanted.site else site_named(model, wanted.output_site)
    reads, adds = state.contract(module), state_of(target).contract(target)
    if reads is None or adds is None:
        raise _not_proven(state if reads is None else state_of(target))
    misfit = _misfit(kernel, reads, adds)
    if misfit is not None:
        raise GrowthError("ESP-434", f"the kernel does not fit '{state.name}': {misfit}")
    if target is not module:
        obstacle = pair_obstacle(model, module, target, pair_norms(wanted))
        if obstacle is not None:
            raise GrowthError(
                "ESP-434", f"no units can be added between '{state.name}' and '{wanted.output_site}': {obstacle}"
            )
        if kernel.chain() is None:
            raise GrowthError("ESP-434", "a kernel across two layers must be one chain of operations")
    return target, reads, adds


def host_weights(module: nn.Module, target: nn.Module) -> HostWeights | None:
    """What an initialiser may copy: weight and bias of the layer that is read, and the weight of the second one of a
    pair, on the CPU as (outputs, inputs, ...). None for a module that is no matrix product."""
    kind, weight = kind_named(state_of(module).kind), getattr(module, "weight", None)
    if kind.form not in ("linear", "conv1d", "conv2d") or not isinstance(weight, torch.Tensor):
        return None
    turned = [t.detach().cpu() for t in (weight, target.weight) if isinstance(t, torch.Tensor)]
    for index, layer in enumerate((module, target)):
        if kind_named(state_of(layer).kind).attributes(layer).get("transposed"):
            turned[index] = turned[index].t()
    bias = getattr(module, "bias", None)
    return HostWeights(
        weight=turned[0],
        bias=bias.detach().cpu() if isinstance(bias, torch.Tensor) else None,
        outgoing=turned[1] if target is not module else None,
    )


def measured_birth(kernel: KernelModule, reads: SiteContract, adds: SiteContract) -> float:
    """The largest absolute output on a seeded batch for the two contracts of `fitting_target`; the kernel's buffers
    stay as they are. Raises GrowthError ESP-434 when its shape is not the site's, ESP-435 when it is not finite."""
    generator = torch.Generator().manual_seed(0)
    shape = (BIRTH_SAMPLES, *_read_shape(kernel, reads, adds))
    some = next(iter((*kernel.parameters(), *kernel.buffers())), torch.empty(0))
    if kernel.typed.reads_ids:
        x = torch.randint(_ids(reads), shape, generator=generator).to(some.device)
    else:
        dtype = floating_dtype(kernel) or TORCH_DTYPES[reads.dtype]
        x = torch.randn(shape, generator=generator).to(some.device, dtype)
    with torch.no_grad(), undisturbed(kernel):
        delta = kernel(x)
    expected = (BIRTH_SAMPLES, *adds.output_shape)
    if tuple(delta.shape) != expected:
        raise GrowthError("ESP-434", f"the kernel gives {tuple(delta.shape)}, '{adds.site}' needs {expected}")
    largest = float(delta.abs().max())
    if not math.isfinite(largest):
        raise GrowthError("ESP-435", f"the output of the kernel for '{reads.site}' is not finite")
    return largest


def _misfit(kernel: KernelModule, reads: SiteContract, adds: SiteContract) -> str | None:
    """Why a kernel does not fit where it would read and add; None where it does.

    Sizes that were others when it was built (the length of a sequence, the places of an image) matter only where they
    change one of its tensors, or where its output would not have the site's shape.
    """
    wanted = kernel.manifest.site
    shape = _read_shape(kernel, reads, adds)
    differences: list[tuple[str, object, object]] = [
        ("kind", wanted.kind, reads.kind),
        ("dtype", wanted.dtype, reads.dtype),
    ]
    built = kernel.typed
    if built.reads_ids:
        differences.append(("number of embeddings", _ids(wanted), _ids(reads)))
    if len(wanted.input_shape) != len(shape):
        differences.append(("input shape", wanted.input_shape, shape))
    for what, theirs, ours in differences:
        if theirs != ours:
            return f"{what} is {ours}, it needs {theirs}"
    now = built
    if shape != built.input_shape:
        try:
            now = check_graph(built.graph.model_copy(update={"inputs": {INPUT: shape}}))
        except BlueprintError as error:
            return f"input shape is {shape}, it needs {wanted.input_shape}: {error.message}"
        if now.stored(wanted.dtype) != built.stored(wanted.dtype):
            return f"input shape is {shape}, it needs {wanted.input_shape}"
    if now.output_shape != adds.output_shape:
        return f"output shape is {adds.output_shape}, it needs {now.output_shape}"
    return None


def _read_shape(kernel: KernelModule, reads: SiteContract, adds: SiteContract) -> tuple[int, ...]:
    return reads.input_shape if kernel.manifest.site.reads == "input" else adds.output_shape


def _ids(contract: SiteContract) -> int:
    number = contract.attributes.get("num_embeddings")
    return number if isinstance(number, int) else 0


def _not_proven(state: SiteState) -> GrowthError:
    if state.obstacle is not None:
        return GrowthError("ESP-432", f"nothing can be grown at '{state.name}': {state.obstacle}")
    return GrowthError(
        "ESP-432",
        f"'{state.name}' has not been called yet, so it is not known that anything grown there would run",
        hint="run the model once, or wrap it with example_inputs=",
    )
