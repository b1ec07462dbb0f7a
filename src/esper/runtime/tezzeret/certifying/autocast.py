"""Whether a kernel stays finite in mixed precision, forward and backward."""

import copy
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch import nn

from esper.runtime.tezzeret.certifying.evidence import FEWEST_ROWS
from esper.runtime.tezzeret.certifying.steps import backward

Outcome = Literal["finite", "not finite", "unavailable"]

PRECISIONS: Mapping[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def under_autocast(kernel: nn.Module, reference: nn.Module, x: Tensor, g: Tensor) -> dict[str, Outcome]:
    """For every precision of mixed training what came of a forward and backward of a private copy.

    `unavailable`: this CPU has no such arithmetic, or the site's own numbers do not fit (a plain layer in the
    kernel's place, `reference`, overflows as well).
    """
    x, g = x[:FEWEST_ROWS], g[:FEWEST_ROWS]
    return {name: _outcome(kernel, reference, x, g, dtype) for name, dtype in PRECISIONS.items()}


def _outcome(kernel: nn.Module, reference: nn.Module, x: Tensor, g: Tensor, dtype: torch.dtype) -> Outcome:
    try:
        if not _broken(kernel, x, g, dtype):
            return "finite"
        return "unavailable" if _broken(reference, x, g, dtype) else "not finite"
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise
        return "unavailable"


def _broken(module: nn.Module, x: Tensor, g: Tensor, dtype: torch.dtype) -> set[str]:
    with torch.autocast("cpu", dtype=dtype):
        return backward(copy.deepcopy(module), x, g)
