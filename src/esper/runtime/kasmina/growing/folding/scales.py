"""Kernels that scale and shift what their host gives, channel by channel: W *= 1 + alpha w, b = b (1 + alpha w) +
alpha c."""

from typing import Any

import torch
from torch import Tensor
from torch import nn

from esper.runtime.kasmina.bank import Slot
from esper.runtime.kasmina.growing.folding.changes import WIDE_ENOUGH
from esper.runtime.kasmina.growing.folding.changes import Change
from esper.runtime.kasmina.growing.folding.changes import Fold
from esper.runtime.kasmina.growing.folding.changes import changed_tensors
from esper.runtime.kasmina.growing.folding.changes import difference_within_rounding
from esper.runtime.kasmina.growing.folding.changes import kernel_output
from esper.runtime.kasmina.growing.folding.changes import plain_output
from esper.runtime.kasmina.growing.folding.changes import seeded_input
from esper.runtime.kasmina.growing.folding.obstacles import is_transposed
from esper.runtime.kasmina.growing.folding.obstacles import weight_obstacle
from esper.runtime.kasmina.growing.optimizer import Optimizers
from esper.runtime.kasmina.growing.optimizer import several
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.wrapping.hosts import kind_named
from esper.runtime.kasmina.wrapping.morphable import sites_of

_CHANNELS_FIRST = ("conv1d", "conv2d")
_OF_CHANNELS = ("layer_norm", "group_norm", "batch_norm")
"""Norms, whose weight and bias are channels themselves (of a LayerNorm over several dimensions: the last)."""


def plan_scale(
    model: nn.Module, module: nn.Module, slot: Slot, affine: nn.Module, optimizer: Optimizers | None
) -> Fold | str:
    """The host's weight and bias scaled and shifted. Only where nothing else is added before this block scales it."""
    form = kind_named(state_of(module).kind).form
    if form == "embedding" and isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "its host renormalises its rows (max_norm)"
    if form not in ("linear", "embedding", *_CHANNELS_FIRST, *_OF_CHANNELS):
        return f"an {form} has no weights of its own at its end" if form == "attention" else _NO_WEIGHTS
    before = _before(model, module, slot)
    if before is not None:
        return f"it also scales what {before} adds"
    obstacle = weight_obstacle(model, module)
    if obstacle is not None:
        return obstacle
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None:
        return "its host has no weights that could be scaled"
    if weight.dtype not in WIDE_ENOUGH:
        return f"{weight.dtype} would lose a part of it"
    scale, shift = affine.weight, affine.bias
    assert isinstance(scale, Tensor)
    factor = 1.0 + slot.alpha * scale.detach().double()
    changes = [Change(module, "weight", (weight.detach().double() * _along(module, form, factor)).to(weight.dtype))]
    if isinstance(shift, Tensor):
        added = slot.alpha * shift.detach().double()
        if form == "embedding":
            total = changes[0].value.double() + added
            changes = [Change(module, "weight", total.to(weight.dtype))]
        elif bias is None:
            shape = weight.shape if form in _OF_CHANNELS else added.shape
            value = added.expand(shape).contiguous().to(weight.dtype)
            state = _state(optimizer, shift) if slot.alpha == 1.0 and value.shape == shift.shape else None
            changes.append(Change(module, "bias", value, state, shift))
        else:
            changes.append(Change(module, "bias", (bias.detach().double() * factor + added).to(bias.dtype)))
    elif bias is not None:
        changes.append(Change(module, "bias", (bias.detach().double() * factor).to(bias.dtype)))
    planned = tuple(changes)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        x = seeded_input(module, ids=module.num_embeddings if isinstance(module, nn.Embedding) else None)
        output = plain_output(module, x)
        delta = slot.alpha * kernel_output(slot, output)
        after = plain_output(module, x, changed_tensors(planned, module))
        difference = difference_within_rounding(output + delta, after, delta)
    return difference if isinstance(difference, str) else Fold(planned, difference=difference)


_NO_WEIGHTS = "its host is a block, which has no weights of its own that it could be folded into"


def _before(model: nn.Module, module: nn.Module, slot: Slot) -> str | None:
    """A block whose output this one scales besides the host's."""
    name = state_of(module).name
    for other in state_of(module).slots:
        if other is slot or other.kernel is None or other.output_site not in (None, name):
            continue
        if other.reads == "input" or other.seed.index < slot.seed.index:
            return f"seed {other.seed.index}"
    for site, layer in sites_of(model).items():
        for other in state_of(layer).slots:
            if site != name and other.kernel is not None and other.output_site == name:
                return f"the pair that begins at '{site}'"
    return None


def _along(module: nn.Module, form: str, factor: Tensor) -> Tensor:
    """One number for each output channel, in the form that multiplies the weight."""
    weight = module._parameters["weight"]
    assert weight is not None
    if form in ("embedding", *_OF_CHANNELS) or is_transposed(module):
        return factor
    return factor.reshape(-1, *[1] * (weight.dim() - 1))


def _state(optimizer: Optimizers | None, parameter: Tensor) -> dict[str, Any] | None:
    """What an optimizer keeps of a parameter that becomes the host's as it is."""
    if optimizer is None:
        return None
    return next((dict(each.state[parameter]) for each in several(optimizer) if parameter in each.state), None)
