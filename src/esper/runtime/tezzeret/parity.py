"""Whether a kernel can be compiled on this machine, and whether compiled and eager agree."""

import os
import shutil
import sys
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch import nn
from torch._dynamo.exc import TorchDynamoException

RELATIVE_TOLERANCE = 1e-3
"""Largest difference of outputs and gradients between compiled and eager, relative to the eager one's largest value.
Half precision has 8 to 11 bits; it is given the wider bound below."""
HALF_TOLERANCE = 3e-2
ROWS = 32
"""So many rows are enough to compare."""


@dataclass(frozen=True)
class Parity:
    """`difference` is the largest absolute one over output and all gradients; None when nothing was compiled."""

    outcome: Literal["parity", "unavailable", "off"]
    difference: float | None = None
    agrees: bool = True
    reason: str = ""


def c_compiler() -> str | None:
    """The C++ compiler that Inductor calls on a CPU (`CXX`, else the platform's own), or None when there is none."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


def compare(module: nn.Module, x: Tensor, g: Tensor) -> Parity:
    """Compile the module for `x` (batch, ...), run forward and backward with output gradient `g`, compare with eager.

    The module's `.grad` fields stay as they are; running statistics move on, so give a copy where those matter.
    `x` may be ids.
    """
    if x.device.type == "cpu" and c_compiler() is None:
        return Parity("unavailable", reason="no C++ compiler on this machine")
    eager = _values(module, x, g)
    try:
        compiled = _values(torch.compile(module, fullgraph=True, dynamic=True), x, g, list(module.parameters()))
    except TorchDynamoException as error:
        first = str(error).strip().splitlines()
        return Parity("unavailable", reason=f"compiling failed: {first[0] if first else type(error).__name__}")
    pairs = list(zip(eager, compiled, strict=True))
    differences = [float((a.double() - b.double()).abs().max()) for a, b in pairs]
    tolerance = HALF_TOLERANCE if g.element_size() == 2 else RELATIVE_TOLERANCE
    scales = [max(float(a.double().abs().max()), 1e-6) for a, _ in pairs]
    agrees = all(d <= tolerance * scale for d, scale in zip(differences, scales, strict=True))
    return Parity("parity", difference=max(differences), agrees=agrees)


def _values(module: object, x: Tensor, g: Tensor, parameters: list[nn.Parameter] | None = None) -> list[Tensor]:
    assert callable(module)
    if parameters is None:
        assert isinstance(module, nn.Module)
        parameters = list(module.parameters())
    leaf = x.detach().clone().requires_grad_(x.is_floating_point())
    output: Tensor = module(leaf)
    sources = [leaf, *parameters] if leaf.requires_grad else parameters
    gradients = torch.autograd.grad(output, sources, g) if sources else ()
    return [output.detach(), *gradients]
