"""Folding what was grown into the weights of its host, where the algebra allows: no block, no extra latency.

`lowrank` is a sum of weights: W += alpha B A. `widen` is a longer hidden layer: A and a are appended to the first
layer, alpha B to the second. Sums are only folded in float32 or wider (bfloat16 loses 12-23 % of a small delta).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.nn.utils import parametrize

from esper.runtime.kasmina.bank import IDENTITY
from esper.runtime.kasmina.bank import Slot
from esper.runtime.kasmina.bank import is_pointwise
from esper.runtime.kasmina.growing.optimizer import StateRefused
from esper.runtime.kasmina.growing.optimizer import joined_state
from esper.runtime.kasmina.growing.optimizer import replace_parameter
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.wrapping.hosts import host_weight
from esper.runtime.kasmina.wrapping.morphable import sites_of
from esper.runtime.kasmina.wrapping.swap import plain_class

_PLAIN_FORWARDS = {nn.Linear: nn.Linear.forward, nn.Conv2d: nn.Conv2d.forward}
_WIDE_ENOUGH = (torch.float32, torch.float64)


def weight_obstacle(model: nn.Module, module: nn.Module) -> str | None:
    """Why a layer's weights cannot be changed for all that read them; None where they can."""
    if parametrize.is_parametrized(module):
        return "its weights are parametrized"
    forwards = [forward for kind, forward in _PLAIN_FORWARDS.items() if isinstance(module, kind)]
    if not forwards or plain_class(module).forward not in forwards:
        return f"{plain_class(module).__name__} computes its own forward"
    own = {id(p) for p in module.parameters(recurse=False)}
    for other in model.modules():
        if other is not module and any(id(p) in own for p in other.parameters(recurse=False)):
            return "its weights are tied to another layer's"
    return None


def pair_obstacle(model: nn.Module, first: nn.Module, second: nn.Module) -> str | None:
    """Why no units can be added between two layers; None where they can."""
    for module in (first, second):
        if not isinstance(module, nn.Linear):
            return f"a {plain_class(module).__name__} is no Linear"
        obstacle = weight_obstacle(model, module)
        if obstacle is not None:
            return obstacle
    return None


@dataclass(frozen=True)
class Change:
    """A parameter of the host and what becomes of it."""

    module: nn.Module
    name: str
    value: Tensor
    state: dict[str, Any] | None
    """What the optimizer knows of a longer one; None where it knows nothing."""
    grown: Tensor | None = None


@dataclass(frozen=True)
class Fold:
    """A fold that is known to be possible: nothing can go wrong in `apply`."""

    changes: tuple[Change, ...]
    new_units: int = 0
    first: nn.Module | None = None
    second: nn.Module | None = None

    @property
    def replaces(self) -> bool:
        """Whether parameters of the host become other, longer objects."""
        return self.new_units > 0

    def apply(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Write the new weights. In place where the shape stays; a longer one is a new object, which takes the old
        one's place in the optimizer (a graph that is still alive pins the shape of the old)."""
        for change in self.changes:
            old = change.module._parameters.get(change.name)
            if old is not None and old.shape == change.value.shape:
                with torch.no_grad():
                    old.copy_(change.value)
                continue
            # A parameter that the host did not have takes the place of the one that it was grown as.
            replaced = change.grown if old is None else old
            assert isinstance(replaced, Tensor)
            new = nn.Parameter(change.value, requires_grad=replaced.requires_grad)
            change.module._parameters[change.name] = new
            if optimizer is not None:
                replace_parameter(optimizer, replaced, new, change.state)
        if isinstance(self.first, nn.Linear) and isinstance(self.second, nn.Linear):
            self.first.out_features += self.new_units
            self.second.in_features += self.new_units
            _lengthen(self.first, self.second, self.new_units)


def plan_fold(
    model: nn.Module,
    module: nn.Module,
    slot: Slot,
    optimizer: torch.optim.Optimizer | None,
    *,
    alone: bool = False,
) -> Fold | str:
    """How a slot's kernel becomes part of its host, or why it cannot. Nothing is changed.

    `alone` asks as if no other block shared the width between the two layers of a pair.
    """
    parts = slot.kernel_parts
    if parts is None:
        return "its kernel is not of the form up(act(down(x)))"
    if slot.output_site in (None, state_of(module).name):
        return _plan_sum(model, module, slot)
    second = sites_of(model)[str(slot.output_site)]
    obstacle = pair_obstacle(model, module, second)
    if obstacle is not None:
        return obstacle
    if not alone and other_users(model, module, second, parts.down.weight.shape[0]):
        return "another block reads or writes the units between the two layers"
    return _plan_units(module, second, slot, optimizer)


def _plan_sum(model: nn.Module, module: nn.Module, slot: Slot) -> Fold | str:
    parts = slot.kernel_parts
    assert parts is not None
    if parts.activation != IDENTITY:
        return f"{parts.activation} stands between its two operations"
    obstacle = weight_obstacle(model, module)
    if obstacle is not None:
        return obstacle
    weight = module._parameters["weight"]
    assert weight is not None
    if weight.dtype not in _WIDE_ENOUGH:
        return f"{weight.dtype} would lose a part of it"
    if parts.down.bias is not None or parts.up.bias is not None:
        return "it has a bias"
    down, up = parts.down.weight.detach().double(), parts.up.weight.detach().double()
    if isinstance(module, nn.Linear) and isinstance(parts.down, nn.Linear) and isinstance(parts.up, nn.Linear):
        delta = up @ down
    elif isinstance(module, nn.Conv2d) and isinstance(parts.down, nn.Conv2d) and isinstance(parts.up, nn.Conv2d):
        if module.groups != 1 or _geometry(module) != _geometry(parts.down) or not is_pointwise(parts.up):
            return "its geometry is not the host's"
        delta = torch.einsum("or,rikl->oikl", up.flatten(1), down)
    else:
        return "its operations are not the host's"
    value = (weight.detach().double() + slot.alpha * delta).to(weight.dtype)
    return Fold((Change(module, "weight", value, None),))


def _geometry(conv: nn.Conv2d) -> tuple[object, ...]:
    padding: tuple[int, ...] = tuple(conv._reversed_padding_repeated_twice)
    return (conv.kernel_size, conv.stride, padding, conv.dilation, conv.padding_mode, conv.groups)


def _plan_units(first: nn.Module, second: nn.Module, slot: Slot, optimizer: torch.optim.Optimizer | None) -> Fold | str:
    parts = slot.kernel_parts
    assert parts is not None
    down, up = parts.down, parts.up
    if up.bias is not None:
        return "it adds a bias to the second layer"
    units = int(down.weight.shape[0])
    try:
        changes = [
            _joined(first, "weight", down.weight, 0, optimizer, 1.0),
            _joined(second, "weight", up.weight, 1, optimizer, slot.alpha),
        ]
        if first._parameters.get("bias") is not None or down.bias is not None:
            # Units without a bias beside a host with one: theirs is zero; and the other way round.
            new_biases = down.weight.new_zeros(units) if down.bias is None else down.bias
            changes.append(_joined(first, "bias", new_biases, 0, optimizer, 1.0))
    except StateRefused as refused:
        return str(refused)
    return Fold(tuple(changes), units, first, second)


def other_users(model: nn.Module, first: nn.Module, second: nn.Module, units: int) -> list[tuple[nn.Module, Slot]]:
    """Blocks that add to the first layer's output or read the second one's input, and are not yet as wide as that
    will be with `units` more."""
    first_name, second_name = state_of(first).name, state_of(second).name
    width = host_weight(first).shape[0] + units
    found = []
    for name, module in sites_of(model).items():
        for slot in state_of(module).slots:
            if slot.kernel is None:
                continue
            adds, reads = (slot.output_site or name) == first_name, name == second_name
            parts = slot.kernel_parts
            if parts is None:
                short = adds or reads
            else:
                short = (adds and parts.up.weight.shape[0] != width) or (reads and parts.down.weight.shape[1] != width)
            if short:
                found.append((module, slot))
    return found


def _joined(
    module: nn.Module,
    name: str,
    grown: Tensor,
    dim: int,
    optimizer: torch.optim.Optimizer | None,
    scale: float,
) -> Change:
    host = module._parameters.get(name)
    old = host.detach() if host is not None else grown.new_zeros(host_weight(module).shape[0])
    value = torch.cat([old, grown.detach().to(old.dtype) * scale], dim=dim)
    state = None
    if optimizer is not None:
        state = joined_state(optimizer, old if host is None else host, grown, dim, scale)
    return Change(module, name, value, state, grown)


def _lengthen(first: nn.Module, second: nn.Module, units: int) -> None:
    head, tail = state_of(first), state_of(second)
    if head.output_shape is not None:
        head.output_shape = (*head.output_shape[:-1], head.output_shape[-1] + units)
    if tail.input_shape is not None:
        tail.input_shape = (*tail.input_shape[:-1], tail.input_shape[-1] + units)
