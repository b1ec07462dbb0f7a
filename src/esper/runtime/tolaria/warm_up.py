"""Paying for slow imports before a run is there: the first optimizer of a process costs seconds."""

import torch
from torch.utils.flop_counter import FlopCounterMode

import esper.runtime.tolaria.session  # noqa: F401


def warm_up() -> None:
    """Construct an optimizer, take a step and count it. Draws nothing from a global random generator."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.AdamW([weight])
    with FlopCounterMode(display=False):
        (weight @ weight).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
