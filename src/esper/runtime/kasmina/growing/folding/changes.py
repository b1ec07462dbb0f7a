"""What a fold will change, worked out and measured beforehand, so that nothing can go wrong while it is done."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import nn

from esper.runtime.kasmina.bank import Slot
from esper.runtime.kasmina.growing.optimizer import Optimizers
from esper.runtime.kasmina.growing.optimizer import replace_parameter
from esper.runtime.kasmina.layer import SiteState
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.wrapping.hosts import host_tensor
from esper.runtime.kasmina.wrapping.swap import plain_class

WIDE_ENOUGH = (torch.float32, torch.float64)
"""Sums of weights are only taken in these: bfloat16 loses 12 to 23 % of a small delta."""

SAMPLES = 2
ROUNDINGS = 256
"""A fold may change the output by so many roundings of its largest value: sums in another order, and no more."""


@dataclass(frozen=True)
class Change:
    """A parameter or buffer of the host and what becomes of it."""

    module: nn.Module
    name: str
    value: Tensor
    state: dict[str, Any] | None = None
    """What the optimizer knows of a longer parameter; None where it knows nothing."""
    grown: Tensor | None = None
    """The kernel's parameter whose place is taken by one that the host did not have."""

    @property
    def is_buffer(self) -> bool:
        return self.name in self.module._buffers

    @property
    def replaces(self) -> bool:
        """Whether a parameter becomes another object: its length changes, or there was none."""
        old = self.module._parameters.get(self.name)
        return not self.is_buffer and (old is None or old.shape != self.value.shape)


@dataclass(frozen=True)
class Fold:
    """A fold that is known to be possible: nothing can go wrong in `apply`.

    `settings` are plain attributes of modules that follow (`out_features`, `num_features`); `widths` are sites with
    the shapes of their input and output afterwards. `difference` is the largest absolute change of the output that
    was measured on a seeded batch, in evaluation mode.
    """

    changes: tuple[Change, ...]
    settings: tuple[tuple[nn.Module, str, int], ...] = ()
    widths: tuple[tuple[SiteState, tuple[int, ...] | None, tuple[int, ...] | None], ...] = ()
    difference: float = 0.0

    @property
    def replaces(self) -> bool:
        """Whether parameters of the host become other, longer objects."""
        return any(change.replaces for change in self.changes)

    def apply(self, optimizer: Optimizers | None) -> None:
        """Write the new weights. In place where the shape stays; a longer one is a new object, which takes the old
        one's place in the optimizer (a graph that is still alive pins the shape of the old)."""
        for change in self.changes:
            if change.is_buffer:
                change.module._buffers[change.name] = change.value
                continue
            old = change.module._parameters.get(change.name)
            if not change.replaces:
                assert old is not None
                with torch.no_grad():
                    old.copy_(change.value)
                continue
            replaced = change.grown if old is None else old
            assert isinstance(replaced, Tensor)
            new = nn.Parameter(change.value, requires_grad=replaced.requires_grad)
            change.module._parameters[change.name] = new
            if optimizer is not None:
                replace_parameter(optimizer, replaced, new, change.state)
        for module, name, value in self.settings:
            setattr(module, name, value)
        for state, input_shape, output_shape in self.widths:
            state.input_shape, state.output_shape = input_shape, output_shape


def plain_output(
    module: nn.Module,
    x: Tensor,
    tensors: Mapping[str, Tensor] | None = None,
    settings: Mapping[str, int] | None = None,
) -> Tensor:
    """What a layer's own forward gives in evaluation mode, with other parameters, buffers and plain attributes in
    place of its own; no hook runs and nothing of the layer changes."""
    given = tensors or {}
    cls = plain_class(module)
    shell = cls.__new__(cls)
    shell.__dict__.update(module.__dict__)
    shell.__dict__ |= {"training": False, **(settings or {})}
    parameters: dict[str, Any] = {**module._parameters}
    buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    for name, value in given.items():
        (buffers if name in buffers else parameters)[name] = value
    shell.__dict__["_parameters"], shell.__dict__["_buffers"] = parameters, buffers
    returned = cls.forward(shell, x)
    output: Tensor = returned[0] if isinstance(returned, tuple) else returned
    return output


def seeded_input(module: nn.Module, *, ids: int | None = None) -> Tensor:
    """A batch that a site could be called with: standard normal, or ids below `ids`."""
    shape = (SAMPLES, *(state_of(module).input_shape or ()))
    generator = torch.Generator().manual_seed(0)
    tensor = host_tensor(module)
    device = torch.device("cpu") if tensor is None else tensor.device
    if ids is not None:
        return torch.randint(ids, shape, generator=generator).to(device)
    return torch.randn(shape, generator=generator).to(device, torch.float32 if tensor is None else tensor.dtype)


def changed_tensors(changes: tuple[Change, ...], module: nn.Module) -> dict[str, Tensor]:
    """The new parameters and buffers of one module, by name."""
    return {change.name: change.value for change in changes if change.module is module}


def kernel_output(slot: Slot, x: Tensor) -> Tensor:
    """What a chain kernel gives in evaluation mode, without its alpha."""
    for _, _, module in slot.kernel.chain() or ():  # type: ignore[union-attr, operator]
        x = plain_output(module, x)
    return x


def difference_within_rounding(before: Tensor, after: Tensor, delta: Tensor) -> float | str:
    """The largest change of an output, or why it is more than sums in another order could make."""
    difference = float((after.double() - before.double()).abs().max())
    largest = max(float(before.abs().max()), float(delta.abs().max()), float((before - delta).abs().max()))
    bound = ROUNDINGS * torch.finfo(before.dtype).eps * largest
    if not difference <= bound:
        return f"it would change the output by {difference:.3g}, more than rounding does ({bound:.3g})"
    return difference
