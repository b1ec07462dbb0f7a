"""The blocks that share the width between two layers, and making them as wide as it will be."""

import torch
from torch import Tensor
from torch import nn

from esper.runtime.kasmina.bank import Slot
from esper.runtime.kasmina.growing.folding.changes import Change
from esper.runtime.kasmina.growing.folding.changes import Fold
from esper.runtime.kasmina.growing.folding.obstacles import output_width
from esper.runtime.kasmina.growing.optimizer import Optimizers
from esper.runtime.kasmina.growing.optimizer import joined_state
from esper.runtime.kasmina.growing.optimizer_state import StateRefused
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.wrapping.morphable import sites_of
from esper.runtime.tezzeret.build import KernelModule


def other_users(
    model: nn.Module, first: nn.Module, second: nn.Module, norms: tuple[str, ...], units: int
) -> list[tuple[nn.Module, Slot]]:
    """Blocks that read or write what flows between the two layers, and are not yet as wide as that will be with
    `units` more."""
    width = output_width(first) + units
    found = []
    for module in sites_of(model).values():
        for slot in state_of(module).slots:
            if slot.kernel is None:
                continue
            reads, adds = _sides(module, slot, first, second, norms)
            if (reads or adds) and not _is_wide(slot, width, reads=reads, adds=adds):
                found.append((module, slot))
    return found


def plan_padding(
    module: nn.Module,
    slot: Slot,
    first: nn.Module,
    second: nn.Module,
    norms: tuple[str, ...],
    units: int,
    optimizer: Optimizers | None,
) -> Fold | str:
    """One block made wider by `units` where it shares the width, or why it cannot be: what is added reads and adds
    zero. Nothing is changed."""
    if not _can_be_padded(slot):
        return f"seed {slot.seed.index} of '{slot.seed.site}' reads or writes them, and it cannot be made wider"
    assert isinstance(slot.kernel, KernelModule)
    chain = slot.kernel.chain()
    assert chain is not None
    reads, adds = _sides(module, slot, first, second, norms)
    changes: list[Change] = []
    settings: list[tuple[nn.Module, str, int]] = []
    head, last = chain[0][2], chain[-1][2]
    try:
        if adds:
            changes += [_padded(last, n, 0, units, optimizer) for n, p in last._parameters.items() if p is not None]
            settings += _longer(last, ("out_features", "out_channels"), units)
        if reads and chain[0][1] != "affine":
            changes.append(_padded(head, "weight", 1, units, optimizer))
            settings += _longer(head, ("in_features", "in_channels"), units)
    except StateRefused as refused:
        return f"seed {slot.seed.index} of '{slot.seed.site}' reads or writes them: {refused}"
    return Fold(tuple(changes), tuple(settings))


_PADDED = (nn.Linear, nn.Conv1d, nn.Conv2d)


def _can_be_padded(slot: Slot) -> bool:
    chain = slot.kernel.chain() if isinstance(slot.kernel, KernelModule) else None
    if chain is None:
        return False
    return [op for _, op, _ in chain] == ["affine"] or all(
        isinstance(part, _PADDED) for part in (chain[0][2], chain[-1][2])
    )


def _sides(
    module: nn.Module, slot: Slot, first: nn.Module, second: nn.Module, norms: tuple[str, ...]
) -> tuple[bool, bool]:
    """Whether a block reads, and whether it adds to, what flows between the two layers."""
    name, head, tail = state_of(module).name, state_of(first).name, state_of(second).name
    target = slot.output_site or name
    adds = target == head or target in norms
    if slot.reads == "output":
        return name == head or name in norms, adds
    return name == tail or name in norms, adds


def _is_wide(slot: Slot, width: int, *, reads: bool, adds: bool) -> bool:
    chain = slot.kernel.chain() if isinstance(slot.kernel, KernelModule) else None
    if chain is None or not _can_be_padded(slot):
        return False
    last, head = chain[-1][2]._parameters["weight"], chain[0][2]._parameters["weight"]
    assert last is not None and head is not None
    if adds and last.shape[0] != width:
        return False
    return not reads or head.dim() == 1 or head.shape[1] == width


def _padded(module: nn.Module, name: str, dim: int, units: int, optimizer: Optimizers | None) -> Change:
    old = module._parameters[name]
    assert old is not None
    shape = list(old.shape)
    shape[dim] = units
    zeros: Tensor = torch.zeros(shape, dtype=old.dtype, device=old.device)
    state = None if optimizer is None else joined_state(optimizer, old, zeros, dim, 1.0)
    return Change(module, name, torch.cat([old.detach(), zeros], dim=dim), state)


def _longer(module: nn.Module, names: tuple[str, ...], units: int) -> list[tuple[nn.Module, str, int]]:
    return [(module, name, getattr(module, name) + units) for name in names if hasattr(module, name)]
