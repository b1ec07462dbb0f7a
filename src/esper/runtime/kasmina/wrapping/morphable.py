"""The wrapped model as a whole: its sites, and what their forwards have to do after each change."""

import difflib
from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import TypeVar

from torch import Tensor
from torch import nn

from esper.contracts.operational import LayerGraph
from esper.errors import SiteError
from esper.runtime.kasmina.bank import Slot
from esper.runtime.kasmina.layer import KasminaLayer
from esper.runtime.kasmina.layer import Recorder
from esper.runtime.kasmina.layer import SiteState
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.tap import Tap
from esper.runtime.kasmina.wrapping.compiled import make_room_for_recompilation
from esper.runtime.kasmina.wrapping.fused import leave_fused_paths
from esper.runtime.kasmina.wrapping.swap import swap_back

M = TypeVar("M", bound=nn.Module)

STATE = "_kasmina_model"


class MorphableModel:
    """Mixin of every wrapped model; the model keeps its own type."""

    _kasmina_model: "ModelState"


@dataclass
class ModelState:
    """What a wrapped model knows as a whole. Plain Python, like `SiteState`."""

    seeds_per_layer: int
    generation: int = 0
    graph: LayerGraph | None = None
    """The dataflow between the sites, once it has been seen."""
    pair_refusals: dict[str, str] = field(default_factory=dict)
    """Why layers begin no pair between which units can be added, as that forward showed it."""
    read_elsewhere: frozenset[str] | None = None
    """Sites whose weights are read outside of their own forward too; None while that has not been seen."""
    suspended: bool = False
    fused: dict[str, Any] = field(default_factory=dict)
    guards: list[Any] = field(default_factory=list)


def model_state(model: nn.Module) -> ModelState:
    """The state of a wrapped model. Raises SiteError ESP-314 for one that is not wrapped."""
    state = model.__dict__.get(STATE)
    if not isinstance(model, MorphableModel) or not isinstance(state, ModelState):
        raise SiteError(
            "ESP-314", f"this {type(model).__name__} is not a wrapped model", hint="call esper.wrap(model) first"
        )
    return state


def has_seeds(module: nn.Module) -> bool:
    """Whether a layer is a site."""
    return isinstance(module, KasminaLayer)


def sites_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that have seeds, by dotted name, in module order (a shared layer by its first name)."""
    model_state(model)
    return {name: module for name, module in model.named_modules() if has_seeds(module)}


def site_named(model: nn.Module, site: str) -> nn.Module:
    """One layer by its name. Raises SiteError ESP-314 with near names."""
    sites = sites_of(model)
    names: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    found = names.get(site)
    if found is not None and has_seeds(found):
        return found
    why = "is a layer without seeds" if site in names else "is no layer of this model"
    raise SiteError("ESP-314", f"site '{site}' {why}", hint=near_names(site, sites))


def settle(model: nn.Module) -> None:
    """Bring what the forwards do into line with the seeds: to be called after every structural change."""
    state = model_state(model)
    sites = sites_of(model)
    taps: list[Tap] = []
    inbound: dict[str, list[tuple[Tap, tuple[Slot, ...]]]] = {}
    outbound: dict[str, list[Tap]] = {}
    busy: set[str] = set()
    for name, module in sites.items():
        site = state_of(module)
        site.suspended = state.suspended
        speaking = [s for s in site.slots if s.kernel is not None and s.alpha != 0.0]
        within = [s for s in speaking if s.output_site in (None, name)]
        site.live = tuple(s for s in within if s.reads == "input")
        site.after = tuple(s for s in within if s.reads == "output")
        across: dict[str, list[Slot]] = {}
        for slot in speaking:
            if slot.output_site not in (None, name):
                across.setdefault(str(slot.output_site), []).append(slot)
        for target, slots in across.items():
            parts = slots[0].kernel_parts
            activation = None if parts is None else parts.activation
            tap = Tap(name, target, activation)
            taps.append(tap)
            outbound.setdefault(name, []).append(tap)
            inbound.setdefault(target, []).append((tap, tuple(slots)))
            busy |= {name, target}
        if within or site.recorder is not None:
            busy.add(name)
    for name, module in sites.items():
        site = state_of(module)
        site.outbound = tuple(outbound.get(name, ()))
        site.inbound = tuple(inbound.get(name, ()))
        site.settle()
    recorded = {name for name, module in sites.items() if state_of(module).recorder is not None}
    leave_fused_paths(model, recorded if state.suspended else busy, state.fused)
    release_guards(state)
    make_room_for_recompilation(model)
    if taps:
        # Only a call that breaks off between the two layers of a pair leaves anything to be cleared.
        state.guards = [
            model.register_forward_pre_hook(_clear_before),
            model.register_forward_hook(_clear_after, always_call=True),
        ]


def release_guards(state: ModelState) -> None:
    """Take the hooks off that clear the taps."""
    for guard in state.guards:
        guard.remove()
    state.guards = []


def _clear_before(model: nn.Module, args: Any) -> None:
    for module in sites_of(model).values():
        for tap in state_of(module).outbound:
            tap.clear()


def _clear_after(model: nn.Module, args: Any, output: Any) -> None:
    _clear_before(model, args)


@contextmanager
def dormant(model: nn.Module) -> Iterator[None]:
    """Run as if nothing had been grown: compare a grown model with the original. May be nested."""
    state = model_state(model)
    before = state.suspended
    state.suspended = True
    settle(model)
    try:
        yield
    finally:
        state.suspended = before
        settle(model)


@contextmanager
def recording(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Let `recorder` see every call of every site. Fused paths are left meanwhile, so that sites are called."""
    layers = sites_of(model).values()
    before = [(state_of(module), state_of(module).recorder) for module in layers]
    for site, _ in before:
        site.recorder = recorder
    settle(model)
    try:
        yield
    finally:
        for site, former in before:
            site.recorder = former
        settle(model)


def strip(model: nn.Module, kept: Iterable[str] = ()) -> None:
    """Give a model and all its layers their own classes back. Whatever is grown must be gone from them; layers
    named in `kept` were replaced and must go on being called where torch has a fused path around them."""
    for module in sites_of(model).values():
        del module.__dict__["_kasmina"]
        swap_back(module, KasminaLayer)
    release_guards(model_state(model))
    leave_fused_paths(model, set(kept), model_state(model).fused)
    del model.__dict__[STATE]
    swap_back(model, MorphableModel)


class Silent:
    """A recorder that only makes every layer take its own forward."""

    def record(self, module: nn.Module, state: SiteState, x: Tensor, output: Tensor) -> Tensor:
        return output


def near_names(name: str, known: Iterable[str]) -> str:
    """A hint: the names nearest to one that is not known, else what there is."""
    near = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(repr(n) for n in near)}?" if near else f"candidates: {listed(known)}"


def listed(names: Iterable[str]) -> str:
    """Names for a message: the first twelve, and how many more there are."""
    known = list(names)
    more = f" and {len(known) - 12} more" if len(known) > 12 else ""
    return ", ".join(known[:12]) + more or "none"
