"""Few rows that stand for many: places of a site's output, spread over its samples and over the places of a sample."""

import math

import torch
from torch import Tensor
from torch import nn

from esper.runtime.kasmina.wrapping.hosts import HostKind

FEEDS_ACTIVATION = frozenset({"linear", "conv1d", "conv2d", "batch_norm", "group_norm"})
"""Forms whose outputs an activation reads: only there is a unit that is never above zero a dead one."""

MOST_ELEMENTS = 65_536

_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def evenly(count: int, most: int, device: torch.device | None = None) -> Tensor:
    """At most `most` indices below `count`, evenly spread, ascending; int64, on `device` (default: the CPU)."""
    if count <= most:
        return torch.arange(count, device=device)
    return torch.arange(most, device=device) * count // most


def scattered_rows(kind: HostKind, module: nn.Module, output: Tensor, most: int) -> Tensor:
    """A copy of at most `most` rows (rows, channels) of one output of a site, detached.

    Rows come from samples as far apart as possible. Where a sample has many places (pixels, tokens), row i takes the
    one at the fractional part of i times the golden ratio, which leaves no part of the sample out.
    """
    samples = kind.output_samples(module, output.detach())
    if samples.dim() == 2:
        return samples[:most].clone()
    first = kind.channels(module, tuple(samples.shape[1:])) == "first"
    places = samples.flatten(2) if first else samples.flatten(1, -2)
    count, each = places.shape[0], places.shape[2 if first else 1]
    rows = min(most, count * each)
    # Counted on the device: sending indices there would wait for it.
    number = torch.arange(rows, device=places.device)
    # As many rows of each sample as of any other, each with a place of its own.
    sample = number * count // rows
    golden = ((number.to(torch.float32) * _GOLDEN).frac() * each).long().clamp_max(each - 1)
    place = golden if rows < count * each else number % each
    return places[sample, :, place] if first else places[sample, place]


def some_of(tensor: Tensor) -> Tensor:
    """A view of at most about `MOST_ELEMENTS` elements of a tensor: rows of its first dimension, evenly spread."""
    if tensor.numel() <= MOST_ELEMENTS:
        return tensor
    rows = max(1, MOST_ELEMENTS * tensor.shape[0] // tensor.numel())
    return tensor[:: -(-tensor.shape[0] // rows)]
