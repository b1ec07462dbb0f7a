"""What a probe takes from a model: copies of what every site read, gave and was asked to change, and a few norms.

The copies are all that the signals are computed from, so that can happen later and on another thread.
"""

import math
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import nn

from esper.contracts.enums import SeedState
from esper.runtime.kasmina.health.rows import evenly
from esper.runtime.kasmina.layer import SiteState
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.wrapping.hosts import kind_named
from esper.runtime.kasmina.wrapping.hosts import own_parameters

MAX_ROWS = 2048
"""Rows of the matrix product that the statistics are taken over; a convolution has one for each place."""

_LATER = frozenset({"conv1d", "conv2d", "embedding"})
"""Forms whose rows of x cost much to lay out (patches, one-hot ids), by a geometry that never changes."""
_ROOM = 4
"""Rows are chosen from so many times as many, so that they come from more samples."""


@dataclass(frozen=True)
class Norms:
    """Of one site: Frobenius norms (0-d, float32, on the device) of the host's gradient and weights and of the
    gradient of its newborn parameters, with the number of elements that got one. None: no gradient there."""

    gradient: Tensor | None
    elements: int
    weight: Tensor | None
    newborn: Tensor | None
    newborn_elements: int


@dataclass(frozen=True)
class SiteCapture:
    """Of one site, detached copies on the device: x (samples, *input shape), y and g (samples, *output shape).

    `rows_of_y` and `rows_of_g` (rows, channels) are those of `looked_at` samples, and `rows_of_x()` lays out what they
    read: (rows, fan in). g is None where no gradient came.
    """

    site: str
    form: str
    x: Tensor
    y: Tensor
    g: Tensor | None
    looked_at: int
    rows_of_y: Tensor
    rows_of_g: Tensor | None
    rows_of_x: Callable[[], Tensor]
    norms: Norms


class CallRecorder:
    """Keeps what each site read and gave, and the gradient there, of every call and of the first samples of each."""

    def __init__(self, max_samples: int) -> None:
        self.max_samples = max_samples
        self.x: dict[str, list[Tensor]] = {}
        self.y: dict[str, list[Tensor]] = {}
        self.g: dict[str, dict[int, Tensor]] = {}

    def record(self, module: nn.Module, state: SiteState, x: Tensor, output: Tensor) -> Tensor:
        """Copy, since layers behind this one may work in place (called by the layer)."""
        name, kind = state.name, kind_named(state.kind)
        call = len(self.x.setdefault(name, []))
        self.x[name].append(self._kept(kind.input_samples(module, x)))
        self.y.setdefault(name, []).append(self._kept(kind.output_samples(module, output)))
        if output.requires_grad:
            gradients = self.g.setdefault(name, {})

            def keep(gradient: Tensor) -> None:
                gradients[call] = self._kept(kind.output_samples(module, gradient))

            output.register_hook(keep)  # type: ignore[no-untyped-call]
        return output

    def taken(self, module: nn.Module, gradients: dict[int, Tensor]) -> SiteCapture | None:
        """Everything of one site; None where it was not called. `gradients` are those of all parameters, by id."""
        state = state_of(module)
        if state.name not in self.x:
            return None
        caught = self.g.get(state.name, {})
        used = [call for call in range(len(self.x[state.name])) if call in caught]
        calls = used or list(range(len(self.x[state.name])))
        x = self._joined([self.x[state.name][call] for call in calls])
        y = self._joined([self.y[state.name][call] for call in calls])
        g = self._joined([caught[call] for call in calls]) if used else None
        kind = kind_named(state.kind)
        places = max(1, kind.to_output_rows(module, y[:1]).shape[0])
        # One-hot rows are as wide as there are different ids: no more of them than are looked at.
        room = 1 if kind.form == "embedding" else _ROOM
        some = evenly(y.shape[0], math.ceil(room * MAX_ROWS / places), y.device)
        read = _at(x, some)

        def rows_of_x() -> Tensor:
            return kind.to_input_rows(module, read)

        # What a block is made of can change while this waits to be measured: its rows are laid out at once.
        laid_out = None if kind.form in _LATER else rows_of_x()
        return SiteCapture(
            site=state.name,
            form=kind.form,
            x=x,
            y=y,
            g=g,
            looked_at=len(some),
            rows_of_y=kind.to_output_rows(module, _at(y, some)),
            rows_of_g=None if g is None else kind.to_output_rows(module, _at(g, some)),
            rows_of_x=rows_of_x if laid_out is None else lambda: laid_out,
            norms=_norms(module, gradients),
        )

    def _kept(self, samples: Tensor) -> Tensor:
        return samples.detach()[: self.max_samples].clone()

    def _joined(self, calls: Sequence[Tensor]) -> Tensor:
        return calls[0] if len(calls) == 1 else torch.cat(list(calls))[: self.max_samples]


def _at(tensor: Tensor, indices: Tensor) -> Tensor:
    """The rows at ascending indices; the tensor itself where that is all of them."""
    return tensor if len(indices) == tensor.shape[0] else tensor[indices]


def _norms(module: nn.Module, gradients: dict[int, Tensor]) -> Norms:
    host = [p for _, p in own_parameters(module)]
    newborn = [
        p
        for slot in state_of(module).slots
        if slot.kernel is not None and slot.seed.state is SeedState.TRAINING
        for p in slot.kernel.parameters()
    ]
    of_host = [gradients[id(p)] for p in host if id(p) in gradients]
    of_newborn = [gradients[id(p)] for p in newborn if id(p) in gradients]
    return Norms(
        gradient=_norm(of_host),
        elements=sum(g.numel() for g in of_host),
        weight=_norm([p.detach() for p in host]),
        newborn=_norm(of_newborn),
        newborn_elements=sum(g.numel() for g in of_newborn),
    )


def _norm(tensors: list[Tensor]) -> Tensor | None:
    if not tensors:
        return None
    norms = torch._foreach_norm(tensors, dtype=torch.float32)
    whole: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return whole
