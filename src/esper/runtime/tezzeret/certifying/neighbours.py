"""Whether a newborn kernel leaves what is around it alone: the gradients that pass, and what is trained already.

Two copies of a layer that has been trained for a while, with its optimizer, take one more step on the same batch, one
of them with the kernel grafted. At birth nothing may differ between the two, to the bit: not the layer's weights, not
one entry that its optimizer keeps, not the gradient that goes on to the layers below.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import nn

from esper.runtime.tezzeret.certifying.evidence import FEWEST_ROWS
from esper.runtime.tezzeret.certifying.reference import Reference
from esper.runtime.tezzeret.certifying.steps import Stepping

STEPS_BEFORE = 2
"""So many steps has the layer behind it: an optimizer with something to lose."""


@dataclass(frozen=True)
class Disturbance:
    """What differs between the twins: the largest change of the gradient that leaves the layer downwards, relative
    to its largest value, and the names of what changed in the optimizer or the weights."""

    gradient: float
    touched: tuple[str, ...]


def disturbance(
    kernel: nn.Module, reference: Reference, reads: str, x: Tensor, g: Tensor, stepping: Stepping
) -> Disturbance:
    """Graft a copy of `kernel` beside a trained copy of `reference`, which `reads` its input or output, and compare.
    The kernel's own parameters take no step."""
    x, g = x[:FEWEST_ROWS], g[:FEWEST_ROWS]
    host = copy.deepcopy(reference)
    host.redraw(torch.Generator(device="cpu").manual_seed(0))
    (optimizer,) = stepping.optimizers([host.weight], 1.0)
    for _ in range(STEPS_BEFORE):
        _step(host, None, x, g, optimizer, reads)
    alone, with_kernel = copy.deepcopy((host, optimizer)), copy.deepcopy((host, optimizer))
    newborn = copy.deepcopy(kernel).train()
    passed = _step(alone[0], None, x, g, alone[1], reads)
    disturbed = _step(with_kernel[0], newborn, x, g, with_kernel[1], reads)
    before = _remembered(alone[1], alone[0].weight) | {"weight": alone[0].weight.detach()}
    after = _remembered(with_kernel[1], with_kernel[0].weight) | {"weight": with_kernel[0].weight.detach()}
    touched = [name for name in before.keys() | after.keys() if not _same(before.get(name), after.get(name))]
    return Disturbance(_difference(passed, disturbed), tuple(sorted(touched)))


def _step(
    host: nn.Module, kernel: nn.Module | None, x: Tensor, g: Tensor, optimizer: torch.optim.Optimizer, reads: str
) -> Tensor | None:
    """One step; gives the gradient with respect to `x`, None where that is ids."""
    optimizer.zero_grad(set_to_none=True)
    leaf = x.detach().clone().requires_grad_(x.is_floating_point())
    output = host(leaf)
    if kernel is not None:
        output = output + kernel(output if reads == "output" else leaf)
    output.backward(g)
    optimizer.step()
    return leaf.grad


def _remembered(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, Any]:
    return {f"state '{key}'": value for key, value in optimizer.state[weight].items()}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def _difference(one: Tensor | None, other: Tensor | None) -> float:
    if one is None or other is None or torch.equal(one, other):
        return 0.0
    scale = float(one.double().abs().max()) or 1.0
    value = float((one.double() - other.double()).abs().max()) / scale
    return value if math.isfinite(value) else math.inf
