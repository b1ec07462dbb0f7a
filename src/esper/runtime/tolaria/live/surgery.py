"""What each fact does to a model under training. Live models and twins are changed by the same functions."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import nn

from esper.contracts.assets import Seed
from esper.contracts.enums import SeedState
from esper.contracts.operational import Fact
from esper.errors import EsperError
from esper.runtime.kasmina import growth
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.lifecycle import REMOVABLE
from esper.runtime.kasmina.wrapping.morphable import site_named
from esper.runtime.kasmina.wrapping.morphable import sites_of
from esper.runtime.kasmina.wrapping.undisturbed import undisturbed
from esper.runtime.tezzeret.build import KernelModule
from esper.runtime.tolaria.live.run_state import HeldGraft
from esper.runtime.tolaria.live.run_state import Ramp
from esper.runtime.tolaria.live.run_state import RunState
from esper.runtime.tolaria.trainee import Trainee

REMOVAL_STEPS = 64
"""Over so many steps a person's cull takes alpha from 1 to 0, before the block is removed exactly."""

BIRTH_ROWS = 64


def seed_of(model: nn.Module, site: str, seed: int) -> Seed | None:
    """The record of one seed; `None` where the site has none of that number. Raises `SiteError` for an unknown site."""
    slots = state_of(site_named(model, site)).slots
    return slots[seed].seed if 0 <= seed < len(slots) else None


def all_seeds(model: nn.Module) -> tuple[Seed, ...]:
    """The records of all seeds, in module order."""
    return tuple(slot.seed for module in sites_of(model).values() for slot in state_of(module).slots)


def grown_kernels(model: nn.Module) -> tuple[KernelModule, ...]:
    """The kernels that are part of the model, in module order."""
    slots = (slot for module in sites_of(model).values() for slot in state_of(module).slots)
    return tuple(slot.kernel for slot in slots if isinstance(slot.kernel, KernelModule))


@contextmanager
def eager_kernels(model: nn.Module) -> Iterator[None]:
    """Compiled kernels run eagerly inside: a dispatch mode, such as torch's counter of FLOPs, cannot see into them."""
    kernels = [(kernel, kernel.accelerated) for kernel in grown_kernels(model)]
    for kernel, _ in kernels:
        kernel.accelerated = None
    try:
        yield
    finally:
        for kernel, compiled in kernels:
            kernel.accelerated = compiled


def place_of(fact: Fact) -> tuple[str, int]:
    """Site and seed of a fact that has them."""
    if fact.site is None or fact.seed is None:
        raise ValueError(f"{fact.kind} of {fact.adaptation_id} names no seed")
    return fact.site, fact.seed


def graft(trainee: Trainee, state: RunState, fact: Fact, kernel: KernelModule) -> tuple[RunState, str | None]:
    """Insert the kernel and put it on probation. Returns the reason when it must go again at once.

    The function is preserved, exactly: the site's output and the loss of real rows do not change by one bit. A
    kernel that does not fit or would change them is no reason for training to fail.
    """
    site, seed = place_of(fact)
    output_site = kernel.manifest.site.output_site
    rows = trainee.plan.train.peek(trainee.plan.probed[:BIRTH_ROWS])
    before = _outputs(trainee, output_site, rows)
    try:
        growth.attach(
            trainee.model,
            site,
            kernel,
            optimizer=trainee.optimizer,
            seed=seed,
            adaptation_id=fact.adaptation_id,
            step=fact.apply_step,
        )
    except EsperError as error:
        return state, f"rejected: {error.message}"
    except Exception as error:
        return state, _raised(error)
    held = state.model_copy(update={"held": HeldGraft(fact=fact)})
    try:
        changed = _largest_change(before, _outputs(trainee, output_site, rows))
    except Exception as error:
        return held, _raised(error)
    return held, None if changed == 0.0 else f"rejected: its birth changed the output by {changed:.3g}"


def _raised(error: Exception) -> str:
    return f"rejected: it raised {type(error).__name__}: {error}"


def keep(trainee: Trainee, state: RunState, fact: Fact) -> RunState:
    """The verdict is KEEP: the block stays, unfolded, and goes on being trained."""
    site, seed = place_of(fact)
    growth.fossilize(trainee.model, site, optimizer=trainee.optimizer, seed=seed, fold=False)
    return state.model_copy(update={"held": None})


def discard(trainee: Trainee, state: RunState, fact: Fact) -> RunState:
    """Remove the block at once and exactly, and free its slot under the next generation."""
    site, seed = place_of(fact)
    record = seed_of(trainee.model, site, seed)
    if record is not None and record.state is not SeedState.DORMANT:
        growth.cull(trainee.model, site, optimizer=trainee.optimizer, seed=seed)
    else:
        free_slot(trainee.model, site, seed)
    return state.model_copy(update={"held": None})


def strike(trainee: Trainee, state: RunState, fact: Fact) -> RunState:
    """The kernel has failed the step that comes: that step is taken without it. Changes nothing where the kernel is no
    longer on probation."""
    held = state.held
    if held is None or held.fact.adaptation_id != fact.adaptation_id:
        return state
    _become(trainee.model, fact, SeedState.ERROR_RECOVERY)
    counts = {"strikes": held.strikes + 1, "all_strikes": held.all_strikes + 1, "struck_at": fact.apply_step}
    return state.model_copy(update={"held": held.model_copy(update=counts)})


def recover(trainee: Trainee, state: RunState) -> RunState:
    """The kernel on probation has done a step again: its strikes are no longer in a row."""
    held = state.held
    if held is None or held.strikes == 0:
        return state
    _become(trainee.model, held.fact, SeedState.TRAINING)
    return state.model_copy(update={"held": held.model_copy(update={"strikes": 0, "struck_at": None})})


def give_up(trainee: Trainee, state: RunState, fact: Fact) -> RunState:
    """A breaker or a quarantine: the kernel goes at once, if it is there, and its slot is free under the next
    generation."""
    site, seed = place_of(fact)
    record = seed_of(trainee.model, site, seed)
    if record is None or record.adaptation_id not in (None, fact.adaptation_id):
        return state
    return discard(trainee, state, fact)


@contextmanager
def asleep(model: nn.Module, site: str, seed: int) -> Iterator[None]:
    """Inside, a kernel that is part of the model is not executed."""
    slot = state_of(site_named(model, site)).slots[seed]
    alpha = slot.alpha
    growth.set_alpha(model, site, seed, 0.0)
    try:
        yield
    finally:
        growth.set_alpha(model, site, seed, alpha)


def _become(model: nn.Module, fact: Fact, state: SeedState) -> None:
    site, seed = place_of(fact)
    record = seed_of(model, site, seed)
    if record is not None and record.state is not state:
        growth.set_state(model, site, seed, state)


def free_slot(model: nn.Module, site: str, seed: int) -> None:
    """Give a dormant slot its next generation: whatever was meant for it before is stale from now on."""
    record = seed_of(model, site, seed)
    if record is not None and record.state is SeedState.DORMANT:
        for following in (SeedState.GERMINATED, SeedState.CULLED, SeedState.DORMANT):
            growth.set_state(model, site, seed, following)


def begin_removal(trainee: Trainee, state: RunState, fact: Fact) -> RunState:
    """A person's cull: from this step on alpha falls to 0; the block is no longer on probation.

    Changes nothing where the block has gone in the meantime.
    """
    site, seed = place_of(fact)
    record = seed_of(trainee.model, site, seed)
    if record is None or record.adaptation_id != fact.adaptation_id or record.state not in REMOVABLE:
        return state
    end = min(fact.apply_step + REMOVAL_STEPS, trainee.plan.total_steps)
    ramp = Ramp(adaptation_id=fact.adaptation_id, site=site, seed=seed, start_step=fact.apply_step, end_step=end)
    held = state.held
    if held is not None and held.fact.adaptation_id == fact.adaptation_id:
        held = None
    return state.model_copy(update={"held": held, "ramps": (*state.ramps, ramp)})


def follow_ramps(trainee: Trainee, state: RunState) -> None:
    """Before a step: alpha is a function of the step."""
    for ramp in state.ramps:
        growth.set_alpha(trainee.model, ramp.site, ramp.seed, ramp.alpha(trainee.step))


def end_ramps(trainee: Trainee, state: RunState) -> RunState:
    """After a step: blocks whose alpha has come to 0 are removed."""
    ended = [ramp for ramp in state.ramps if trainee.step >= ramp.end_step]
    for ramp in ended:
        growth.cull(trainee.model, ramp.site, optimizer=trainee.optimizer, seed=ramp.seed)
    return state.model_copy(update={"ramps": tuple(ramp for ramp in state.ramps if ramp not in ended)})


def _outputs(trainee: Trainee, site: str, rows: Any) -> list[Tensor]:
    """What the site's layer puts out for some rows, and their loss."""
    model = trainee.model
    outputs: list[Tensor] = []
    with undisturbed(model), torch.no_grad(), _watched(site_named(model, site), outputs):
        outputs.append(trainee.plan.loss(model, rows).detach())
    return outputs


def _largest_change(before: list[Tensor], after: list[Tensor]) -> float:
    pairs = zip(before, after, strict=True)
    return max(float((a.double() - b.double()).abs().max()) if a.numel() else 0.0 for a, b in pairs)


@contextmanager
def _watched(module: nn.Module, outputs: list[Tensor]) -> Iterator[None]:
    def note(_: nn.Module, __: Any, output: Tensor) -> None:
        outputs.append(output.detach().clone())

    handle = module.register_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()
