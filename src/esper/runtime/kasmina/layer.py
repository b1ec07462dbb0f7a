"""The layer that seeds stand beside: dormant it is its own class's forward behind one Python bool."""

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import Protocol

import torch
from torch import Tensor
from torch import nn

from esper.contracts.assets import Seed
from esper.contracts.assets import SiteContract
from esper.contracts.enums import SeedState
from esper.errors import GrowthError
from esper.runtime.kasmina.bank import Slot
from esper.runtime.kasmina.bank import activate
from esper.runtime.kasmina.bank import add_seeds
from esper.runtime.kasmina.wrapping.hosts import kind_named


class KasminaLayer:
    """Mixin of every layer that has seeds; the layer keeps its own type, name and place."""

    _kasmina: "SiteState"


class Recorder(Protocol):
    """Watches the calls of layers for a while; what it returns takes the place of the output."""

    def record(self, module: nn.Module, state: "SiteState", x: Tensor, output: Tensor) -> Tensor: ...


class Tap:
    """What the first layer of a pair read, on its way to the second one's output.

    Holds tensors only between the calls of the two layers. Several calls of the first may be open at once
    (one module in two towers): each call of the second is then matched by its input, which must be the
    activation of what that call of the first returned.
    """

    def __init__(self, source: str, target: str, activation: str) -> None:
        self.source = source
        self.target = target
        self.activation = activation
        self._pending: list[tuple[Tensor, Tensor]] = []

    def push(self, x: Tensor, output: Tensor) -> None:
        self._pending.append((x, output))

    def pop(self, received: Tensor) -> Tensor:
        """The input of the first layer's call that led to `received`. Raises GrowthError ESP-439 if there is none."""
        if len(self._pending) == 1:
            return self._pending.pop()[0]
        for index, (_, output) in enumerate(self._pending):
            if self._leads_to(output, received):
                return self._pending.pop(index)[0]
        raise GrowthError(
            "ESP-439",
            f"'{self.target}' was called on something that '{self.source}' did not compute, but a block that was "
            "grown across the two needs both",
            hint=f"call the layers in pairs, or cull the block at '{self.source}'",
        )

    def clear(self) -> None:
        self._pending.clear()

    def _leads_to(self, output: Tensor, received: Tensor) -> bool:
        if output.shape != received.shape:
            return False
        if output.data_ptr() == received.data_ptr():
            return True
        with torch.no_grad():
            return torch.equal(activate(self.activation, output), received)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model begins with no call open.
        return self.__dict__ | {"_pending": []}


@dataclass
class SiteState:
    """What one layer knows of its seeds. Plain Python: nothing here is a parameter, a buffer or a module's child."""

    name: str
    kind: str
    slots: list[Slot]
    input_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None
    """Shapes of one sample, seen in the first forward: the proof that this layer's forward is really called."""
    idle: bool = False
    suspended: bool = False
    live: tuple[Slot, ...] = ()
    outbound: tuple[Tap, ...] = ()
    inbound: tuple[tuple[Tap, tuple[Slot, ...]], ...] = ()
    recorder: Recorder | None = field(default=None, repr=False)

    @property
    def proven(self) -> bool:
        return self.input_shape is not None

    def settle(self) -> None:
        """Work out anew whether the forward has anything to do."""
        busy = bool(self.live or self.outbound or self.inbound) and not self.suspended
        self.idle = self.proven and not busy and self.recorder is None

    def prove(self, x: Tensor, output: Tensor) -> None:
        kind = kind_named(self.kind)
        self.input_shape = kind.sample_shape(x)
        self.output_shape = kind.sample_shape(output)
        self.settle()

    def contract(self, module: nn.Module) -> SiteContract | None:
        """The site's contract by the shapes of its first forward; None while there was none."""
        if self.input_shape is None or self.output_shape is None:
            return None
        return kind_named(self.kind).contract(self.name, module, self.input_shape, self.output_shape)


def new_state(name: str, kind: str, seeds: int) -> SiteState:
    """A site whose seeds are all dormant."""
    return SiteState(name, kind, [Slot(Seed(site=name, index=index)) for index in range(seeds)])


def state_of(module: nn.Module) -> SiteState:
    """The state of a layer that has seeds."""
    state: SiteState = module.__dict__["_kasmina"]
    return state


def is_grown(slot: Slot) -> bool:
    """Whether a seed has a kernel of its own in the model now."""
    return slot.kernel is not None and slot.seed.state is not SeedState.CULLED


def layer_forward(base: type[nn.Module]) -> Callable[..., Any]:
    """The forward of the swapped class over `base`."""
    base_forward = base.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._kasmina.idle:
            return base_forward(self, *args, **kwargs)
        return _grown_forward(self, base_forward, args, kwargs)

    return forward


def _grown_forward(
    module: Any, base_forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    state: SiteState = module._kasmina
    output = base_forward(module, *args, **kwargs)
    x = args[0] if args else next(iter(kwargs.values()))
    if not state.proven:
        state.prove(x, output)
    if not state.suspended:
        if state.live:
            output = add_seeds(output, x, state.live)
        for tap, slots in state.inbound:
            output = add_seeds(output, tap.pop(x), slots)
        for tap in state.outbound:
            tap.push(x, output)
    if state.recorder is not None:
        output = state.recorder.record(module, state, x, output)
    return output
