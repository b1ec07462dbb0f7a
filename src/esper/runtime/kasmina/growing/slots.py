"""The slots of a site: what puts a kernel into one, takes it out, and frees it."""

from torch import nn

from esper.contracts.assets import Seed
from esper.contracts.enums import SeedState
from esper.errors import GrowthError
from esper.runtime.kasmina.bank import Slot
from esper.runtime.kasmina.bank import floating_dtype
from esper.runtime.kasmina.bank import kernel_parts
from esper.runtime.kasmina.layer import SiteState
from esper.runtime.kasmina.lifecycle import advance
from esper.runtime.tezzeret.build import KernelModule


def plant(module: nn.Module, slot: Slot, kernel: KernelModule, *, manifest: str, record: Seed, alpha: float) -> None:
    """Put a kernel into its slot and its place in the module tree. The caller settles the model afterwards."""
    if "kasmina" not in module._modules:
        module.add_module("kasmina", nn.ModuleDict())
    container = module._modules["kasmina"]
    assert isinstance(container, nn.ModuleDict)
    container[str(record.index)] = kernel
    slot.seed = record
    slot.kernel = kernel
    slot.kernel_parts = kernel_parts(kernel)
    slot.manifest = manifest
    slot.dtype = floating_dtype(kernel)
    slot.output_site = kernel.manifest.site.output_site
    slot.reads = kernel.manifest.site.reads
    slot.alpha = alpha
    slot.folded = slot.joined = False
    slot.newborn = True


def uproot(module: nn.Module, slot: Slot) -> list[nn.Parameter]:
    """Take a kernel out of its slot and out of the module tree; returns its parameters."""
    assert slot.kernel is not None
    parameters = list(slot.kernel.parameters())
    container = module._modules["kasmina"]
    assert isinstance(container, nn.ModuleDict)
    del container[str(slot.seed.index)]
    if not len(container):
        del module._modules["kasmina"]
    slot.kernel = slot.kernel_parts = slot.dtype = None
    return parameters


def slot_of(state: SiteState, seed: int) -> Slot:
    """One slot by its index. Raises GrowthError ESP-431."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < len(state.slots):
        raise GrowthError("ESP-431", f"'{state.name}' has seeds 0 to {len(state.slots) - 1}, not {seed!r}")
    return state.slots[seed]


def free_slot(state: SiteState, seed: int | None) -> Slot:
    """The slot of that index if nothing is in it, or the first that is free. Raises GrowthError ESP-431."""
    if seed is not None:
        slot = slot_of(state, seed)
        if slot.seed.state not in (SeedState.DORMANT, SeedState.GERMINATED):
            others = [str(s.seed.index) for s in state.slots if s.seed.state is SeedState.DORMANT]
            raise GrowthError(
                "ESP-431",
                f"seed {seed} of '{state.name}' is taken: it is {slot.seed.state}",
                hint=f"free: {', '.join(others) or 'none'}",
            )
        return slot
    free = next((slot for slot in state.slots if slot.seed.state is SeedState.DORMANT), None)
    if free is None:
        raise GrowthError(
            "ESP-431",
            f"all {len(state.slots)} seeds of '{state.name}' are taken",
            hint="cull one, or wrap with more seeds_per_layer",
        )
    return free


def moved(record: Seed, to: SeedState) -> Seed:
    """The record after one legal move. Raises GrowthError ESP-437."""
    return record.model_copy(update={"state": advance(record.state, to)})


def reset(slot: Slot) -> None:
    """Free a slot whose kernel is gone, one generation later."""
    record = moved(moved(slot.seed, SeedState.CULLED), SeedState.DORMANT)
    slot.seed = Seed(site=record.site, index=record.index, generation=record.generation + 1)
    slot.manifest = slot.output_site = slot.stays = None
    slot.reads = "input"
    slot.alpha = 1.0
    slot.newborn = True
