"""Handing a grown model back as ordinary PyTorch: folded where it can be, else a `torch.fx.GraphModule` per site."""

import torch
from torch import fx
from torch import nn

from esper.errors import GrowthError
from esper.runtime.kasmina.bank import Slot
from esper.runtime.kasmina.growing.fold import other_users
from esper.runtime.kasmina.growing.fold import plan_fold
from esper.runtime.kasmina.growing.optimizer import joined_state
from esper.runtime.kasmina.growing.optimizer import replace_parameter
from esper.runtime.kasmina.growth import fold_all
from esper.runtime.kasmina.layer import KasminaLayer
from esper.runtime.kasmina.layer import layer_forward
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.wrapping.morphable import M
from esper.runtime.kasmina.wrapping.morphable import model_state
from esper.runtime.kasmina.wrapping.morphable import settle
from esper.runtime.kasmina.wrapping.morphable import sites_of
from esper.runtime.kasmina.wrapping.morphable import strip
from esper.runtime.kasmina.wrapping.swap import swap
from esper.runtime.kasmina.wrapping.swap import swap_back
from esper.runtime.tezzeret.build import KernelModule
from esper.runtime.tezzeret.ir import INPUT
from esper.runtime.tezzeret.ir import check_graph

OPTIMIZER = torch.optim.Optimizer | None


def unwrap(model: M, *, optimizer: OPTIMIZER = None) -> M:
    """The original classes back, on the same object, with everything that was grown: no line of Esper runs in it.

    Blocks are folded into their hosts' weights where the algebra allows (float32 or wider, plain and untied
    weights; `widen` always). A site with a block that cannot be folded becomes a `torch.fx.GraphModule` of torch's
    own modules, with the same parameter names plus the block's; hooks move over. Give the `optimizer` to train on.
    Raises SiteError ESP-314 (not wrapped), GrowthError ESP-438 (a layer whose own forward cannot be traced, or a
    pair whose weights were tied or parametrized since it was grown); the model then is as it was.
    """
    state = model_state(model)
    _check(model, optimizer)
    state.suspended = False
    fold_all(model, _grown(model), optimizer)
    for module, slot in reversed(_across(model)):
        _pad_others(model, module, slot, optimizer)
        fold_all(model, [(module, slot)], optimizer)
    settle(model)
    kept = {name: module for name, module in sites_of(model).items() if "kasmina" in module._modules}
    replaced = {}
    for module in kept.values():
        slots = [slot for slot in state_of(module).slots if slot.kernel is not None and slot.alpha != 0.0]
        swap_back(module, KasminaLayer)
        del module.__dict__["_kasmina"]
        replaced[id(module)] = _graph_module(module, slots)
    for parent in list(model.modules()):
        for child, layer in list(parent._modules.items()):
            if id(layer) in replaced:
                parent._modules[child] = replaced[id(layer)]
    strip(model, kept)
    return model


def _grown(model: nn.Module) -> list[tuple[nn.Module, Slot]]:
    return [(m, slot) for m in sites_of(model).values() for slot in state_of(m).slots if slot.kernel is not None]


def _across(model: nn.Module) -> list[tuple[nn.Module, Slot]]:
    return [(m, slot) for m, slot in _grown(model) if slot.output_site not in (None, state_of(m).name)]


def _check(model: nn.Module, optimizer: OPTIMIZER) -> None:
    """Everything that could stop `unwrap`, before it begins."""
    sites = sites_of(model)
    for module, slot in _across(model):
        second = sites[str(slot.output_site)]
        plan = plan_fold(model, module, slot, optimizer, alone=True)
        obstacle = plan if isinstance(plan, str) else None
        if any(other.kernel_parts is None for _, other in other_users(model, module, second, 0)):
            obstacle = "a block beside it is not of the form up(act(down(x)))"
        if obstacle is not None:
            raise GrowthError(
                "ESP-438", f"the units between '{slot.seed.site}' and '{slot.output_site}' stay: {obstacle}"
            )
    for module in {id(m): m for m, _ in _grown(model)}.values():
        name = state_of(module).name
        swap_back(module, KasminaLayer)
        try:
            fx.Tracer().trace(module)
        except Exception as error:  # tracing runs the user's own forward on proxies: it may raise anything
            raise GrowthError(
                "ESP-438",
                f"'{name}' cannot become plain PyTorch, its forward cannot be traced: {error}",
                hint="cull what is grown there, or keep the model wrapped",
            ) from error
        finally:
            swap(module, KasminaLayer, layer_forward)


def _pad_others(model: nn.Module, first: nn.Module, slot: Slot, optimizer: OPTIMIZER) -> None:
    """Make blocks that share the width between two layers as wide as it will be: what is added reads and adds zero."""
    assert slot.kernel_parts is not None
    units = int(slot.kernel_parts.down.weight.shape[0])
    second = sites_of(model)[str(slot.output_site)]
    for module, other in other_users(model, first, second, units):
        parts = other.kernel_parts
        assert parts is not None
        if (other.output_site or state_of(module).name) == state_of(first).name:
            _pad(parts.up, 0, units, optimizer)
            parts.up.out_features += units
        if module is second:
            _pad(parts.down, 1, units, optimizer)
            parts.down.in_features += units


def _pad(module: nn.Linear, dim: int, units: int, optimizer: OPTIMIZER) -> None:
    old = module.weight
    shape = list(old.shape)
    shape[dim] = units
    zeros = torch.zeros(shape, dtype=old.dtype, device=old.device)
    module.weight = nn.Parameter(torch.cat([old.detach(), zeros], dim=dim))
    if optimizer is not None:
        replace_parameter(optimizer, old, module.weight, joined_state(optimizer, old, zeros, dim, 1.0))


def _graph_module(module: nn.Module, slots: list[Slot]) -> nn.Module:
    """The host's own forward, traced, plus its kernels node by node."""
    graph = fx.Tracer().trace(module)
    x = next(node for node in graph.nodes if node.op == "placeholder")
    end = next(node for node in graph.nodes if node.op == "output")
    total = end.args[0]
    with graph.inserting_before(end):
        for slot in slots:
            kernel = slot.kernel
            assert isinstance(kernel, KernelModule)
            typed = check_graph(kernel.manifest.graph)
            values = {INPUT: x}
            for node in typed.nodes:
                target = f"kasmina.{slot.seed.index}.{node.id}"
                values[node.id] = graph.call_module(target, tuple(values[name] for name in node.inputs))
            delta = values[typed.output]
            if slot.alpha != 1.0:
                delta = graph.call_function(torch.mul, (delta, slot.alpha))
            total = graph.call_function(torch.add, (total, delta))
    end.args = (total,)
    result = fx.GraphModule(module, graph)
    result.train(module.training)
    for name, value in module.__dict__.items():
        # Hooks move over; plain attributes such as `out_features` stay readable.
        if "hooks" in name or (name not in result.__dict__ and not name.startswith("_")):
            result.__dict__[name] = value
    return result
