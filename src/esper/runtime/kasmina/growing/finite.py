"""Weights that are not finite are refused where they are found: beside NaN no birth is exact and no fold is a sum."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from esper.errors import GrowthError


def refuse_broken(place: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise GrowthError ESP-435 naming every floating tensor that holds NaN or Inf. Tensors on the meta device pass."""
    broken = [name for name, tensor in tensors if not _finite(tensor.detach())]
    if broken:
        raise GrowthError(
            "ESP-435",
            f"{place} has weights that are not finite: {', '.join(broken)}",
            hint="go back to a state before training diverged",
        )


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.is_meta or tensor.numel() == 0:
        return True
    # One pass and no copy, where `isfinite` makes a tensor of the same size: these may be whole embeddings.
    low, high = torch.aminmax(tensor if tensor.element_size() > 1 else tensor.float())
    return math.isfinite(float(low)) and math.isfinite(float(high))
