"""Kernels that are a product of matrices and nothing else: W += alpha B A."""

import torch
from torch import Tensor
from torch import nn

from esper.runtime.kasmina.bank import Slot
from esper.runtime.kasmina.bank import is_pointwise
from esper.runtime.kasmina.growing.folding.changes import WIDE_ENOUGH
from esper.runtime.kasmina.growing.folding.changes import Change
from esper.runtime.kasmina.growing.folding.changes import Fold
from esper.runtime.kasmina.growing.folding.changes import difference_within_rounding
from esper.runtime.kasmina.growing.folding.changes import kernel_output
from esper.runtime.kasmina.growing.folding.changes import plain_output
from esper.runtime.kasmina.growing.folding.changes import seeded_input
from esper.runtime.kasmina.growing.folding.obstacles import is_transposed
from esper.runtime.kasmina.growing.folding.obstacles import weight_obstacle
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.wrapping.hosts import kind_named


def plan_sum(model: nn.Module, module: nn.Module, slot: Slot, down: nn.Module, up: nn.Module) -> Fold | str:
    """W + alpha up(down(.)) as one weight. The sum is taken in float64 and rounded once."""
    obstacle = weight_obstacle(model, module)
    if obstacle is not None:
        return obstacle
    weight = module._parameters["weight"]
    assert weight is not None
    if weight.dtype not in WIDE_ENOUGH:
        return f"{weight.dtype} would lose a part of it"
    delta = product(module, down, up)
    if isinstance(delta, str):
        return delta
    value = (weight.detach().double() + slot.alpha * delta).to(weight.dtype)
    change = Change(module, "weight", value)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        x = seeded_input(module, ids=module.num_embeddings if isinstance(module, nn.Embedding) else None)
        added = slot.alpha * kernel_output(slot, x)
        before = plain_output(module, x) + added
        difference = difference_within_rounding(before, plain_output(module, x, {"weight": value}), added)
    return difference if isinstance(difference, str) else Fold((change,), difference=difference)


def product(module: nn.Module, down: nn.Module, up: nn.Module) -> Tensor | str:
    """The weight, float64, that a layer like `module` needs to compute up(down(.)); or why there is none."""
    if getattr(down, "bias", None) is not None or getattr(up, "bias", None) is not None:
        return "it has a bias"
    outer, inner = up.weight, down.weight
    assert isinstance(outer, Tensor) and isinstance(inner, Tensor)
    outer, inner = outer.detach().double(), inner.detach().double()
    form = kind_named(state_of(module).kind).form
    if form == "linear" and isinstance(down, nn.Linear) and isinstance(up, nn.Linear):
        return (outer @ inner).T if is_transposed(module) else outer @ inner
    if isinstance(module, nn.Embedding) and isinstance(down, nn.Embedding) and isinstance(up, nn.Linear):
        if module.max_norm is not None:
            return "its host renormalises its rows (max_norm)"
        return inner @ outer.T
    if (
        isinstance(module, nn.Conv1d | nn.Conv2d)
        and isinstance(down, type(up))
        and isinstance(up, nn.Conv1d | nn.Conv2d)
    ):
        if module.groups != 1:
            return f"its host has {module.groups} groups and the block mixes them"
        if geometry(module) != geometry(down) or not is_pointwise(up):
            return "its geometry is not the host's"
        return torch.einsum("or,r...->o...", outer.flatten(1), inner)
    return "its operations are not the host's"


def geometry(conv: nn.Module) -> tuple[object, ...]:
    """What decides how a convolution lies on its input, but for its groups."""
    assert isinstance(conv, nn.Conv1d | nn.Conv2d)
    padding: tuple[int, ...] = tuple(conv._reversed_padding_repeated_twice)
    return (conv.kernel_size, conv.stride, padding, conv.dilation, conv.padding_mode)
