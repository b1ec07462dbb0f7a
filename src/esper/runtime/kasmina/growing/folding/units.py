"""Kernels across two layers: their units become units of the hidden width between the two, exactly."""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch import nn

from esper.runtime.kasmina.bank import Slot
from esper.runtime.kasmina.growing.between import pair_norms
from esper.runtime.kasmina.growing.folding.changes import Change
from esper.runtime.kasmina.growing.folding.changes import Fold
from esper.runtime.kasmina.growing.folding.changes import changed_tensors
from esper.runtime.kasmina.growing.folding.changes import difference_within_rounding
from esper.runtime.kasmina.growing.folding.changes import kernel_output
from esper.runtime.kasmina.growing.folding.changes import plain_output
from esper.runtime.kasmina.growing.folding.changes import seeded_input
from esper.runtime.kasmina.growing.folding.obstacles import is_transposed
from esper.runtime.kasmina.growing.folding.obstacles import output_width
from esper.runtime.kasmina.growing.folding.obstacles import pair_obstacle
from esper.runtime.kasmina.growing.folding.sums import geometry
from esper.runtime.kasmina.growing.folding.users import other_users
from esper.runtime.kasmina.growing.optimizer import Optimizers
from esper.runtime.kasmina.growing.optimizer import joined_state
from esper.runtime.kasmina.growing.optimizer import several
from esper.runtime.kasmina.growing.optimizer_state import StateRefused
from esper.runtime.kasmina.layer import SiteState
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.wrapping.hosts import kind_named
from esper.runtime.kasmina.wrapping.morphable import has_seeds
from esper.runtime.kasmina.wrapping.morphable import sites_of
from esper.runtime.tezzeret.build import KernelModule

Chain = Sequence[tuple[str, str, nn.Module]]


def plan_units(
    model: nn.Module, first: nn.Module, slot: Slot, chain: Chain, optimizer: Optimizers | None, *, alone: bool
) -> Fold | str:
    """The first layer, the norms and the second layer with the kernel's units appended: parameters, buffers and what
    the optimizer keeps of them, all or nothing. `alone` asks as if no other block shared the width."""
    assert isinstance(slot.kernel, KernelModule)
    second = sites_of(model)[str(slot.output_site)]
    names = pair_norms(slot.kernel.manifest.site)
    obstacle = pair_obstacle(model, first, second, names) or _misfit(first, second, chain, len(names))
    if obstacle is not None:
        return obstacle
    down, up = chain[0][2], chain[-1][2]
    units = output_width(down)
    if not alone and other_users(model, first, second, names, units):
        return "another block reads or writes the units between the two layers"
    modules = dict(model.named_modules())
    norms = [modules[name] for name in names]
    grown_norms = [module for _, op, module in chain if op == "batch_norm"]
    try:
        changes = _layer_changes(first, down, second, up, slot.alpha, optimizer)
        for norm, grown in zip(norms, grown_norms, strict=True):
            changes += _norm_changes(norm, grown, optimizer)
    except StateRefused as refused:
        return str(refused)
    planned = tuple(changes)
    fold = Fold(planned, _settings(first, second, norms, units), _widths(first, second, norms, units))
    difference = _difference(first, second, norms, slot, chain, fold)
    return difference if isinstance(difference, str) else replace(fold, difference=difference)


def _misfit(first: nn.Module, second: nn.Module, chain: Chain, norms: int) -> str | None:
    down, up = chain[0][2], chain[-1][2]
    if kind_named(state_of(first).kind).form != chain[0][1] or chain[0][1] != chain[-1][1] or len(chain) < 3:
        return "its operations are not those of the two layers"
    if getattr(up, "bias", None) is not None:
        return "it adds a bias to the second layer"
    if isinstance(down, nn.Conv1d | nn.Conv2d) and (
        geometry(down) != geometry(first) or geometry(up) != geometry(second)
    ):
        return "its geometry is not that of the two layers"
    if sum(op == "batch_norm" for _, op, _ in chain) != norms:
        return "it has another number of BatchNorms than the host between the two layers"
    return None


def _layer_changes(
    first: nn.Module, down: nn.Module, second: nn.Module, up: nn.Module, alpha: float, optimizer: Optimizers | None
) -> list[Change]:
    grown, last = down._parameters["weight"], up._parameters["weight"]
    assert grown is not None and last is not None
    changes = [
        _appended(first, "weight", grown, 0, optimizer, 1.0, transposed=is_transposed(first)),
        _appended(second, "weight", last, 1, optimizer, alpha, transposed=is_transposed(second)),
    ]
    bias = down._parameters.get("bias")
    if first._parameters.get("bias") is not None or bias is not None:
        # Units without a bias beside a host with one: theirs is zero; and the other way round.
        new = grown.new_zeros(grown.shape[0]) if bias is None else bias
        changes.append(_appended(first, "bias", new, 0, optimizer, 1.0))
    return changes


def _norm_changes(norm: nn.Module, grown: nn.Module, optimizer: Optimizers | None) -> list[Change]:
    changes = []
    for name in ("weight", "bias"):
        mine, theirs = norm._parameters.get(name), grown._parameters.get(name)
        if (mine is None) != (theirs is None):
            raise StateRefused(f"one of the two BatchNorms has no {name}")
        if theirs is not None:
            changes.append(_appended(norm, name, theirs, 0, optimizer, 1.0))
    for name in ("running_mean", "running_var"):
        old, new = norm._buffers.get(name), grown._buffers.get(name)
        if (old is None) != (new is None):
            raise StateRefused("only one of the two BatchNorms keeps running statistics")
        if old is not None and new is not None:
            changes.append(Change(norm, name, torch.cat([old.detach(), new.detach().to(old.dtype)])))
    return changes


def _appended(
    module: nn.Module,
    name: str,
    grown: Tensor,
    dim: int,
    optimizer: Optimizers | None,
    scale: float,
    *,
    transposed: bool = False,
) -> Change:
    host = module._parameters.get(name)
    old = grown.new_zeros(output_width(module)) if host is None else host.detach()
    if transposed:
        dim = 1 - dim
    new = grown.detach().T if transposed else grown.detach()
    value = torch.cat([old, new.to(old.dtype) * scale], dim=dim)
    state = None
    if optimizer is not None:
        with _laid_like_host(optimizer, grown, transposed=transposed) as laid:
            state = joined_state(optimizer, old if host is None else host, laid, dim, scale)
    return Change(module, name, value, state, grown)


_CROSSED = {"row_var": "col_var", "col_var": "row_var"}
"""Adafactor's means over rows and over columns: of a transposed weight each is the other's, transposed."""


@contextmanager
def _laid_like_host(optimizer: Optimizers, grown: Tensor, *, transposed: bool) -> Iterator[Tensor]:
    """A kernel's parameter as the host's weight lies, for as long as the optimizer is asked about it: beside a
    transposed weight a stand-in, with everything that is kept of it transposed."""
    if not transposed:
        yield grown
        return
    laid = grown.detach().T
    homes = [(each, group) for each in several(optimizer) for group in each.param_groups if _holds(group, grown)]
    for each, _ in homes:
        for key, value in each.state.get(grown, {}).items():
            if key not in _CROSSED and isinstance(value, Tensor) and value.dim() and value.shape != grown.shape:
                raise StateRefused(f"the optimizer's '{key}' is not kept by element, and the host lies transposed")
    for each, group in homes:
        group["params"].append(laid)
        each.state[laid] = {
            _CROSSED.get(key, key): value.T if isinstance(value, Tensor) and value.dim() == 2 else value
            for key, value in each.state.get(grown, {}).items()
        }
    try:
        yield laid
    finally:
        for each, group in homes:
            group["params"].pop()
            del each.state[laid]


def _holds(group: Mapping[str, Any], parameter: Tensor) -> bool:
    return any(member is parameter for member in group["params"])


def _difference(
    first: nn.Module,
    second: nn.Module,
    norms: Sequence[nn.Module],
    slot: Slot,
    chain: Chain,
    fold: Fold,
) -> float | str:
    """The change of the second layer's output on a seeded batch: what stands between the two is taken from the
    kernel, where it is the same, and from the host where it has weights."""

    def run(module: nn.Module, hidden: Tensor, planned: Fold) -> Tensor:
        settings = {name: value for owner, name, value in planned.settings if owner is module}
        return plain_output(module, hidden, changed_tensors(planned.changes, module), settings)

    def through(planned: Fold) -> Tensor:
        hidden = run(first, x, planned)
        waiting = list(norms)
        for _, op, module in chain[1:-1]:
            hidden = run(waiting.pop(0) if op == "batch_norm" else module, hidden, planned)
        return run(second, hidden, planned)

    with torch.no_grad():
        x = seeded_input(first)
        with torch.autocast(x.device.type, enabled=False):
            delta = slot.alpha * kernel_output(slot, x)
            return difference_within_rounding(through(Fold(())) + delta, through(fold), delta)


def _settings(
    first: nn.Module, second: nn.Module, norms: Sequence[nn.Module], units: int
) -> tuple[tuple[nn.Module, str, int], ...]:
    found = []
    for module, names in (
        (first, ("out_features", "out_channels", "nf")),
        (second, ("in_features", "in_channels", "nx")),
    ):
        found += [(module, name, getattr(module, name) + units) for name in names if hasattr(module, name)]
    for norm in norms:
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        found.append((norm, "num_features", norm.num_features + units))
    return tuple(found)


def _widths(
    first: nn.Module, second: nn.Module, norms: Sequence[nn.Module], units: int
) -> tuple[tuple[SiteState, tuple[int, ...] | None, tuple[int, ...] | None], ...]:
    head, tail = state_of(first), state_of(second)
    axis = -1 if kind_named(head.kind).form == "linear" else 0

    def longer(shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if shape is None:
            return None
        sizes = list(shape)
        sizes[axis] += units
        return tuple(sizes)

    between = [state_of(norm) for norm in norms if has_seeds(norm)]
    return (
        (head, head.input_shape, longer(head.output_shape)),
        (tail, longer(tail.input_shape), tail.output_shape),
        *((state, longer(state.input_shape), longer(state.output_shape)) for state in between),
    )
