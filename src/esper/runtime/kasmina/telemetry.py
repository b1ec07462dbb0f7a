"""Health of every site while training goes on: one step in 128 is watched, and read once a window.

Measured: 0.1 to 1.0 % of a step at this rate (`benchmarks/engine/dormant.py`); variances are 3 % off those over all
rows of an epoch, as a median, most while weights change fast (digits, 141 steps an epoch). One step in 64 with half the
rows costs twice as much and is as far off. Everything stays on the device until the window is read; nothing waits for
the device inside a step.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextlib import contextmanager
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import nn

from esper.contracts.enums import SeedState
from esper.contracts.operational import HealthSignal
from esper.runtime.kasmina.health.rows import FEEDS_ACTIVATION
from esper.runtime.kasmina.health.rows import scattered_rows
from esper.runtime.kasmina.health.rows import some_of
from esper.runtime.kasmina.health.window import BEFORE
from esper.runtime.kasmina.health.window import CHANGE
from esper.runtime.kasmina.health.window import GRADIENT
from esper.runtime.kasmina.health.window import MEAN
from esper.runtime.kasmina.health.window import NEWBORN
from esper.runtime.kasmina.health.window import VARIANCE
from esper.runtime.kasmina.health.window import Change
from esper.runtime.kasmina.health.window import Column
from esper.runtime.kasmina.health.window import Reading
from esper.runtime.kasmina.health.window import Window
from esper.runtime.kasmina.health.window import joined
from esper.runtime.kasmina.health.window import norms_of
from esper.runtime.kasmina.layer import SiteState
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.wrapping.hosts import kind_named
from esper.runtime.kasmina.wrapping.hosts import own_parameters
from esper.runtime.kasmina.wrapping.morphable import model_state
from esper.runtime.kasmina.wrapping.morphable import sites_of

EVERY = 128
ROWS = 64

_UNWATCHED = nullcontext()


@dataclass(frozen=True)
class _Sites:
    """The sites of one model between two structural changes, and every parameter of a host with its site."""

    generation: int
    modules: tuple[nn.Module, ...]
    owned: tuple[tuple[str, nn.Parameter], ...]


@dataclass(frozen=True)
class _Begun:
    """Weights before an optimizer step that is to be measured, and views of where they will be after it."""

    owners: tuple[str, ...]
    now: list[Tensor]
    before: list[Tensor]


class Telemetry:
    """Watches the sites of one model. `rows` rows of the first output of each site in a watched step are looked at."""

    def __init__(self, model: nn.Module, *, every: int = EVERY, rows: int = ROWS) -> None:
        self._model = model
        self._every = every
        self._rows = rows
        self._seen: dict[str, Tensor] = {}
        self._sites: _Sites | None = None
        self._window: Window | None = None
        self._begun: _Begun | None = None
        self._change: Change | None = None
        self._ends_told = False

    def step(self, step: int, *, last: bool = False) -> AbstractContextManager[None]:
        """Around forward and backward of one training step; the optimizer steps after it, before the next call.

        One step in `every` is watched. With `last`, the window ends with this step: then what it changes of the
        weights is measured, whether it is watched or not, and it is watched if no other was. A step that raises counts
        nothing.
        """
        if self._begun is not None:
            self._end_update(self._begun)
        self._ends_told = self._ends_told or last
        if step % self._every == 0 or (last and self._window is None):
            # Only the newest change is kept: whoever tells where windows end has the last step measured.
            return self._watched(measured=last or not self._ends_told)
        return self._measured() if last else _UNWATCHED

    def record(self, module: nn.Module, state: SiteState, x: Tensor, output: Tensor) -> Tensor:
        """Keep a few rows of the first output of a site (called by the layer)."""
        if state.name not in self._seen:
            self._seen[state.name] = scattered_rows(kind_named(state.kind), module, output, self._rows)
        return output

    def take(self) -> Reading:
        """What was seen since the last time, still on the device; the next window begins."""
        if self._begun is not None:
            self._end_update(self._begun)
        states = [state_of(module) for module in self._current().modules]
        units_die = frozenset(state.name for state in states if kind_named(state.kind).form in FEEDS_ACTIVATION)
        reading = Reading(self._window, self._change, units_die)
        self._window, self._change = None, None
        return reading

    def read(self, *, epoch: int, step: int) -> tuple[HealthSignal, ...]:
        """The signals of this window, with one transfer from the device; the next window begins."""
        return self.take().signals(epoch=epoch, step=step)

    @contextmanager
    def _watched(self, *, measured: bool) -> Iterator[None]:
        sites = self._current()
        states = [state_of(module) for module in sites.modules]
        self._seen = {}
        for state in states:
            state.recorder = self
            state.idle = False
        try:
            yield
        finally:
            for state in states:
                state.recorder = None
                state.settle()
        if self._seen:
            with torch.no_grad():
                self._count(sites)
                if measured:
                    self._begin_update(sites)

    @contextmanager
    def _measured(self) -> Iterator[None]:
        yield
        with torch.no_grad():
            self._begin_update(self._current())

    def _current(self) -> _Sites:
        generation = model_state(self._model).generation
        if self._sites is None or self._sites.generation != generation:
            sites = sites_of(self._model)
            owned = tuple((name, p) for name, module in sites.items() for _, p in own_parameters(module))
            self._sites = _Sites(generation, tuple(sites.values()), owned)
        return self._sites

    def _begin_update(self, sites: _Sites) -> None:
        trained = [(owner, p) for owner, p in sites.owned if p.grad is not None]
        if trained:
            now = [some_of(p.detach()) for _, p in trained]
            self._begun = _Begun(tuple(owner for owner, _ in trained), now, [tensor.clone() for tensor in now])

    def _end_update(self, begun: _Begun) -> None:
        self._begun = None
        with torch.no_grad():
            norms = norms_of([*torch._foreach_sub(begun.now, begun.before), *begun.before])
        self._change = Change(
            tuple((quantity, owner) for quantity in (CHANGE, BEFORE) for owner in begun.owners), norms
        )

    def _count(self, sites: _Sites) -> None:
        """Add a watched step to the window; one that saw something else than the window begins a new one."""
        groups: dict[tuple[object, ...], list[str]] = {}
        for name, rows in self._seen.items():
            groups.setdefault((rows.shape, rows.device), []).append(name)
        columns: list[Column] = []
        parts: list[Tensor] = []
        largest: list[Tensor] = []
        for names in groups.values():
            rows = torch.stack([self._seen[name] for name in names]).float()
            flat = rows.flatten(1)
            mean = flat.mean(1, keepdim=True)
            # Two passes: torch.var_mean over one dimension takes ten times as long on small tensors.
            parts += [mean.flatten(), (flat - mean).square_().mean(1)]
            columns += [(quantity, name) for quantity in (MEAN, VARIANCE) for name in names]
            largest.append(rows.amax(1))
        elements: dict[Column, int] = {}
        trained = [(owner, p) for owner, p in sites.owned if p.grad is not None and owner in self._seen]
        if trained:
            parts.append(norms_of([p.grad for _, p in trained if p.grad is not None]))
            columns += [(GRADIENT, owner) for owner, _ in trained]
            for owner, p in trained:
                elements[GRADIENT, owner] = elements.get((GRADIENT, owner), 0) + p.numel()
        newborn = [(o, g) for m in sites.modules for o, g in _newborn_gradients(m) if o in self._seen]
        if newborn:
            parts.append(norms_of([gradient for _, gradient in newborn]))
            columns += [(NEWBORN, owner) for owner, _ in newborn]
            for owner, gradient in newborn:
                elements[NEWBORN, owner] = elements.get((NEWBORN, owner), 0) + gradient.numel()
        step = Window(
            columns=tuple(columns),
            sums=joined(parts),
            groups=tuple(tuple(names) for names in groups.values()),
            largest=largest,
            rows={name: rows.shape[0] for name, rows in self._seen.items()},
            elements=elements,
        )
        if self._window is not None and self._window.takes(step):
            self._window.add(step)
        else:
            self._window = step


def _newborn_gradients(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The gradients of what is on probation beside a layer, with the layer's name."""
    state = state_of(module)
    for slot in state.slots:
        if slot.kernel is not None and slot.seed.state is SeedState.TRAINING:
            for parameter in slot.kernel.parameters():
                if parameter.grad is not None:
                    yield state.name, parameter.grad
