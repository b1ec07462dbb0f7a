"""The module that seeds stand beside: dormant it is its own class's forward behind one Python bool."""

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
from esper.runtime.kasmina.bank import add_seeds
from esper.runtime.kasmina.digest import dtype_name
from esper.runtime.kasmina.tap import Tap
from esper.runtime.kasmina.wrapping.calls import Place
from esper.runtime.kasmina.wrapping.calls import argument_tensors
from esper.runtime.kasmina.wrapping.calls import put_back
from esper.runtime.kasmina.wrapping.calls import taken
from esper.runtime.kasmina.wrapping.geometry import Frame
from esper.runtime.kasmina.wrapping.hosts import HostKind
from esper.runtime.kasmina.wrapping.hosts import kind_named
from esper.runtime.kasmina.wrapping.places import Way
from esper.runtime.kasmina.wrapping.places import way_to_argument
from esper.runtime.kasmina.wrapping.places import way_to_output


class KasminaLayer:
    """Mixin of every module that has seeds; the module keeps its own type, name and place."""

    _kasmina: "SiteState"


class Recorder(Protocol):
    """Watches the calls of sites for a while; what it returns takes the place of the output."""

    def record(self, module: nn.Module, state: "SiteState", x: Tensor, output: Tensor) -> Tensor: ...


@dataclass
class SiteState:
    """What one module knows of its seeds. Plain Python: nothing here is a parameter, a buffer or a module's child."""

    name: str
    kind: str
    frame: Frame
    slots: list[Slot]
    input_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None
    """Shapes of one sample, seen in the first forward: the proof that this module's forward is really called."""
    dtype: str | None = None
    """The dtype of the output that was seen."""
    reads_at: Way | None = None
    returns_at: Way = ()
    """Where `x` was among the arguments of that call, and the output in what it returned."""
    called_directly: bool = False
    """Whether a look at a forward showed that it is not the module but its `forward` that is called."""
    obstacle: str | None = None
    """Why nothing can be grown here, as the first forward showed."""
    idle: bool = False
    suspended: bool = False
    live: tuple[Slot, ...] = ()
    """Seeds that read the input and add to the output."""
    after: tuple[Slot, ...] = ()
    """Seeds that read what the output is so far, in the order in which they do."""
    outbound: tuple[Tap, ...] = ()
    inbound: tuple[tuple[Tap, tuple[Slot, ...]], ...] = ()
    recorder: Recorder | None = field(default=None, repr=False)

    @property
    def proven(self) -> bool:
        return self.input_shape is not None

    def settle(self) -> None:
        """Work out anew whether the forward has anything to do."""
        busy = bool(self.live or self.after or self.outbound or self.inbound) and not self.suspended
        known = self.proven or self.obstacle is not None
        self.idle = known and not busy and self.recorder is None

    def prove(self, module: nn.Module, x: Tensor, output: Tensor) -> None:
        """Note what the first forward showed."""
        kind = kind_named(self.kind)
        self.input_shape = kind.input_shape(module, x)
        self.output_shape = kind.output_shape(module, output)
        self.dtype = dtype_name(output.dtype)
        self.obstacle = None
        self.settle()

    def contract(self, module: nn.Module) -> SiteContract | None:
        """The site's contract by the shapes of its first forward; None while there was none."""
        if self.input_shape is None or self.output_shape is None:
            return None
        kind = kind_named(self.kind)
        return kind.contract(self.name, module, self.input_shape, self.output_shape, self.dtype)


def new_state(name: str, module: nn.Module, kind: HostKind, seeds: int) -> SiteState:
    """A site whose seeds are all dormant."""
    slots = [Slot(Seed(site=name, index=index)) for index in range(seeds)]
    return SiteState(name, kind.name, kind.frame(module), slots)


def state_of(module: nn.Module) -> SiteState:
    """The state of a module that has seeds."""
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
        return _watched_forward(self, base_forward, args, kwargs)

    return forward


def _watched_forward(
    module: Any, base_forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    state: SiteState = module._kasmina
    kind = kind_named(state.kind)
    before = () if state.proven else _versions(args, kwargs)
    returned = base_forward(module, *args, **kwargs)
    place: Place = ()
    output = returned
    if not isinstance(returned, Tensor) or not returned.is_floating_point():
        found = taken(returned)
        if found is None:
            return _unfit(state, returned, "it returns no floating tensor")
        output, place = found
    if not state.proven and output.is_nested:
        # Another call may bring an ordinary batch: this one shows nothing yet.
        return returned
    x = args[0] if args else None
    if kind.argument is None or not isinstance(x, Tensor):
        x = kind.chosen_input(args, kwargs, output)
    if x is None:
        return _unfit(state, returned, f"its output {_shown(output)} has the shape of none of its inputs")
    if not state.proven:
        if any(tensor is x and tensor._version != version for tensor, version in before):
            return _unfit(state, returned, "it changes its input in place")
        state.prove(module, x, output)
        state.reads_at, state.returns_at = way_to_argument(x, args, kwargs), way_to_output(returned, place)
    total = output if state.suspended else _grown(state, x, output)
    if state.recorder is not None:
        total = state.recorder.record(module, state, x, total)
    return returned if total is output else put_back(returned, place, total)


def _grown(state: SiteState, x: Tensor, output: Tensor) -> Tensor:
    """The output with what every seed adds to it."""
    frame = state.frame
    if frame.batch_axis or x.dim() <= frame.input_dims:
        rows = _rows_grown(state, x, output)
    else:
        rows = output
        if state.live:
            rows = add_seeds(rows, x, state.live)
        for tap, slots in state.inbound:
            rows = add_seeds(rows, tap.pop(x), slots)
        for slot in state.after:
            rows = add_seeds(rows, rows, (slot,))
    for tap in state.outbound:
        tap.push(x, rows)
    return rows


def _rows_grown(state: SiteState, x: Tensor, output: Tensor) -> Tensor:
    """`_grown` where the batch is not the first axis: kernels read and give (batch, *sample)."""
    frame = state.frame
    rows = frame.samples(output, frame.output_dims)
    if state.live:
        rows = add_seeds(rows, frame.samples(x, frame.input_dims), state.live)
    for tap, slots in state.inbound:
        rows = add_seeds(rows, frame.samples(tap.pop(x), frame.input_dims), slots)
    for slot in state.after:
        rows = add_seeds(rows, rows, (slot,))
    return frame.unsampled(rows, output, frame.output_dims)


def _unfit(state: SiteState, returned: Any, obstacle: str) -> Any:
    """A call in which there is nothing to read or to add to: passed through while nothing is grown there."""
    busy = (state.live or state.after or state.outbound or state.inbound) and not state.suspended
    if busy:
        raise GrowthError(
            "ESP-434",
            f"'{state.name}' was called in a way that its seeds cannot follow: {obstacle}",
            hint="call it as in its first forward, or cull what is grown there",
        )
    if not state.proven:
        state.obstacle = obstacle
        state.settle()
    return returned


def _versions(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Tensor, int], ...]:
    if torch.compiler.is_compiling():
        return ()
    return tuple((t, t._version) for t in argument_tensors((*args, *kwargs.values())) if not t.is_inference())


def _shown(output: Tensor) -> str:
    return "(nested)" if output.is_nested else str(tuple(output.shape))
