"""Growing, removing and keeping: what changes a wrapped model and its optimizer, at a step boundary.

Each verb plans, checks and then applies, so that a refusal leaves model and optimizer as they were. Codes of
`GrowthError`:

    ESP-431 seed index, slot taken or none free     ESP-436 the function would not be preserved
    ESP-432 the site has not been called yet        ESP-437 not possible in this state of the seed
    ESP-433 the optimizer cannot take it            ESP-438 cannot be unwrapped, saved or cached
    ESP-434 the kernel does not fit the site        ESP-439 the two layers of a pair were called apart
    ESP-435 weights that are not finite             ESP-440 replicas would drift apart
"""

import hashlib
from dataclasses import dataclass
from dataclasses import replace

from torch import nn

from esper.contracts.assets import Certificate
from esper.contracts.assets import Scalar
from esper.contracts.assets import Seed
from esper.contracts.config import TezzeretConfig
from esper.contracts.enums import SeedState
from esper.errors import GrowthError
from esper.errors import NotFoundError
from esper.runtime.failpoints import hit
from esper.runtime.kasmina.bank import Slot
from esper.runtime.kasmina.cache import kernel_cache
from esper.runtime.kasmina.growing.finite import refuse_broken
from esper.runtime.kasmina.growing.fitting import fitting_target
from esper.runtime.kasmina.growing.fitting import host_weights
from esper.runtime.kasmina.growing.fitting import measured_birth
from esper.runtime.kasmina.growing.fitting import site_contract
from esper.runtime.kasmina.growing.fold import plan_fold
from esper.runtime.kasmina.growing.folding.changes import Fold
from esper.runtime.kasmina.growing.optimizer import Optimizers
from esper.runtime.kasmina.growing.optimizer import checked
from esper.runtime.kasmina.growing.optimizer import leave
from esper.runtime.kasmina.growing.optimizer import plan_join
from esper.runtime.kasmina.growing.slots import free_slot
from esper.runtime.kasmina.growing.slots import moved
from esper.runtime.kasmina.growing.slots import plant
from esper.runtime.kasmina.growing.slots import reset
from esper.runtime.kasmina.growing.slots import slot_of
from esper.runtime.kasmina.growing.slots import uproot
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.lifecycle import LIVE
from esper.runtime.kasmina.replicas import refuse_replicated
from esper.runtime.kasmina.wrapping.hosts import host_device
from esper.runtime.kasmina.wrapping.hosts import own_parameters
from esper.runtime.kasmina.wrapping.morphable import model_state
from esper.runtime.kasmina.wrapping.morphable import settle
from esper.runtime.kasmina.wrapping.morphable import site_named
from esper.runtime.kasmina.wrapping.morphable import sites_of
from esper.runtime.kasmina.wrapping.undisturbed import plain_arithmetic
from esper.runtime.tezzeret.artifact import KernelFiles
from esper.runtime.tezzeret.artifact import manifest_bytes
from esper.runtime.tezzeret.blueprints.registry import get_blueprint
from esper.runtime.tezzeret.blueprints.registry import resolve_hyperparameters
from esper.runtime.tezzeret.build import KernelModule
from esper.runtime.tezzeret.build import build_kernel
from esper.runtime.tezzeret.build import load_kernel
from esper.runtime.tezzeret.certify import certify
from esper.runtime.tezzeret.initialisers import DEFAULT


@dataclass(frozen=True)
class Graft:
    """One graft that was made. `birth_difference` is the largest absolute change of the output, measured."""

    site: str
    output_site: str
    seed: int
    generation: int
    blueprint: str
    kernel: str
    hyperparameters: dict[str, Scalar]
    parameters: int
    parameter_names: tuple[str, ...]
    birth_difference: float
    alpha: float = 1.0
    certificate: Certificate | None = None


@plain_arithmetic()
def graft(
    model: nn.Module,
    site: str,
    blueprint: str,
    *,
    optimizer: Optimizers | None = None,
    seed: int | None = None,
    kernel: KernelFiles | KernelModule | str | None = None,
    initialiser: str | None = None,
    **hyperparameters: Scalar,
) -> Graft:
    """Build, certify (in this process) and graft one kernel now, at a step boundary.

    `seed` is the slot (default: the first that is free). The new parameters join the host parameter's own group of
    `optimizer`; in `state_dict()` they are `<site>.kasmina.<slot>.<tensor>`. First weights are drawn from a seed
    made of site, slot and generation, and no random generator of the process is touched. `kernel` grafts a stored
    kernel in place of a new one: its files, a loaded one, or the digest of one in this process's kernel cache. A
    stored kernel whose output is not zero begins at alpha 0. `initialiser` names how first weights are made (the
    default is `residual`, which without samples of the site is `kaiming`).

    Raises SiteError ESP-314 (unknown site), BlueprintError ESP-421..423, ESP-428 (unknown blueprint, hyperparameter or
    initialiser), GrowthError ESP-431..437, NotFoundError ESP-430 (no such kernel), IntegrityError ESP-401..405
    (damaged files).
    """
    module = site_named(model, site)
    state = state_of(module)
    get_blueprint(blueprint)
    if optimizer is not None:
        checked(optimizer)
    slot = free_slot(state, seed)
    _check_materialised(model, module)
    if kernel is not None:
        if hyperparameters or initialiser is not None:
            raise GrowthError("ESP-434", "a stored kernel has its hyperparameters and weights", hint="leave them out")
        loaded = _stored(kernel)
        if loaded.manifest.blueprint != blueprint:
            raise GrowthError("ESP-434", f"the stored kernel is a '{loaded.manifest.blueprint}', not a '{blueprint}'")
        _, reads, adds = fitting_target(model, module, loaded)
        alpha = 1.0 if measured_birth(loaded, reads, adds) == 0.0 else 0.0
        return attach(model, site, loaded, optimizer=optimizer, seed=slot.seed.index, alpha=alpha)
    contract = site_contract(model, site, blueprint)
    if contract.output_site != contract.site:
        own = contract.attributes.get("pair_activation")
        if own is not None and hyperparameters.setdefault("activation", str(own)) != own:
            chosen = hyperparameters["activation"]
            raise GrowthError("ESP-434", f"the pair that begins at '{site}' has {own} between its layers, not {chosen}")
    resolve_hyperparameters(blueprint, contract, hyperparameters)
    files = build_kernel(
        blueprint,
        contract,
        hyperparameters,
        seed=_weights_seed(slot.seed),
        samples=None,
        max_parameters=TezzeretConfig().max_parameters,
        max_flops=TezzeretConfig().max_flops,
        initialiser=initialiser or DEFAULT,
        host=None if initialiser is None else host_weights(module, sites_of(model)[contract.output_site]),
    )
    certificate = certify(files, samples=None, optimizer=optimizer)
    if not certificate.passed:
        raise GrowthError(
            "ESP-436", f"the kernel for '{site}' failed its certificate: {'; '.join(certificate.failures)}"
        )
    made = attach(model, site, load_kernel(files, files.digest), optimizer=optimizer, seed=slot.seed.index)
    return replace(made, certificate=certificate)


@plain_arithmetic()
def attach(
    model: nn.Module,
    site: str,
    kernel: KernelModule,
    *,
    optimizer: Optimizers | None = None,
    seed: int | None = None,
    adaptation_id: str | None = None,
    step: int | None = None,
    alpha: float = 1.0,
) -> Graft:
    """Insert a kernel that is already built and certified, as a seed in TRAINING. It becomes the model's own.

    Measured before anything is changed: shapes, finite weights, and that the output stays what it is (unless
    `alpha` is 0). Raises SiteError ESP-314, GrowthError ESP-431..437.
    """
    refuse_replicated(model, "graft")
    module = site_named(model, site)
    state = state_of(module)
    slot = free_slot(state, seed)
    index = slot.seed.index
    _check_alpha(alpha)
    target, reads, adds = fitting_target(model, module, kernel)
    refuse_broken(f"the kernel for '{site}'", kernel.state_dict().items())
    _check_materialised(model, module)
    for layer in dict.fromkeys((module, target)):
        refuse_broken(f"'{state_of(layer).name}'", own_parameters(layer))
    difference = measured_birth(kernel, reads, adds)
    if alpha != 0.0 and difference != 0.0:
        raise GrowthError(
            "ESP-436",
            f"the kernel for '{site}' would change the output by up to {difference:.3g} at its birth",
            hint="attach it with alpha=0 and raise alpha slowly",
        )
    names = [name for name, _ in kernel.named_parameters()]
    full = tuple(f"{state.name}.kasmina.{index}.{name}" for name in names)
    # Parameters stay the objects they are: `.to` of a module moves them in place.
    kernel.to(host_device(model, module))
    newborn = list(zip(full, kernel.parameters(), strict=True))
    join = None
    if optimizer is not None and newborn:
        host = [(f"{state.name}.{name}", p) for name, p in own_parameters(module)]
        join = plan_join(optimizer, host, newborn)
    record = slot.seed
    if record.state is SeedState.DORMANT:
        record = moved(record, SeedState.GERMINATED)
    record = moved(record, SeedState.TRAINING).model_copy(
        update={
            "blueprint": kernel.manifest.blueprint,
            "kernel": kernel.digest,
            "adaptation_id": adaptation_id,
            "parameters": sum(p.numel() for p in kernel.parameters()),
            "born_step": step,
        }
    )
    kernel.train(module.training)
    plant(module, slot, kernel, manifest=manifest_bytes(kernel.manifest).decode(), record=record, alpha=alpha)
    slot.newborn = difference == 0.0
    slot.joined = join is not None
    hit("graft.parameters_added")
    if join is not None:
        join.apply()
    hit("graft.optimizer_joined")
    model_state(model).generation += 1
    settle(model)
    return Graft(
        site=state.name,
        output_site=state_of(target).name,
        seed=index,
        generation=record.generation,
        blueprint=kernel.manifest.blueprint,
        kernel=kernel.digest,
        hyperparameters=dict(kernel.manifest.hyperparameters),
        parameters=record.parameters,
        parameter_names=full,
        birth_difference=0.0 if alpha == 0.0 else difference,
        alpha=alpha,
    )


def cull(
    model: nn.Module,
    site: str,
    *,
    optimizer: Optimizers | None = None,
    seed: int | None = None,
) -> None:
    """Remove what is grown at a site, at once: from then on exactly the host's own function, to the bit.

    Without `seed` every block of the site goes. Nothing of them stays in `optimizer`. The slots are free again,
    one generation later. Raises SiteError ESP-314, GrowthError ESP-431 (no such seed), ESP-437 (nothing to remove,
    or already part of the host).
    """
    refuse_replicated(model, "cull")
    module = site_named(model, site)
    state = state_of(module)
    slots = [slot for slot in state.slots if slot.kernel is not None]
    if seed is not None:
        slots = [slot_of(state, seed)]
    folded = next((slot for slot in state.slots if slot.folded and (seed is None or slot in slots)), None)
    if folded is not None and all(slot.kernel is None for slot in slots):
        raise GrowthError(
            "ESP-437", f"seed {folded.seed.index} of '{site}' is folded into the host's weights: it cannot be removed"
        )
    if not slots or any(slot.kernel is None for slot in slots):
        raise GrowthError("ESP-437", f"nothing that could be removed is grown at '{site}'")
    for slot in slots:
        parameters = uproot(module, slot)
        if optimizer is not None:
            leave(optimizer, parameters)
        reset(slot)
    model_state(model).generation += 1
    settle(model)


def fossilize(
    model: nn.Module,
    site: str | None = None,
    *,
    optimizer: Optimizers | None = None,
    seed: int | None = None,
    fold: bool = True,
) -> tuple[Seed, ...]:
    """Keep what is grown at a site (or everywhere) for good, and return the records of those seeds.

    Folded into the host's weights where the algebra allows, else kept as the plain module it is; with `fold=False`
    only marked. Folding `widen` makes the host's own parameters longer, in place; give the `optimizer` that trains
    them, so that its state grows with them. Raises SiteError ESP-314, GrowthError ESP-431, ESP-437.
    """
    refuse_replicated(model, "fossilize")
    chosen = _live_slots(model, site, seed)
    if site is not None and not chosen:
        raise GrowthError("ESP-437", f"nothing is on probation at '{site}'")
    for module in dict.fromkeys(module for module, _ in chosen):
        # With what was grown there: its parameters are the module's own by name.
        refuse_broken(f"'{state_of(module).name}'", module.named_parameters())
    kept = []
    for module, slot in chosen:
        record = slot.seed
        for following in (SeedState.GRAFTING, SeedState.FOSSILIZED):
            if record.state is not following:
                record = moved(record, following)
        kept.append((module, slot, record))
    if fold and optimizer is None:
        for module, slot, _ in kept:
            plan = plan_fold(model, module, slot, None)
            if slot.joined and isinstance(plan, Fold) and plan.replaces:
                raise GrowthError(
                    "ESP-433",
                    f"folding seed {slot.seed.index} of '{slot.seed.site}' lengthens parameters of the optimizer",
                    hint="give it with optimizer=, or fold=False",
                )
    for _, slot, record in kept:
        slot.seed = record
    if fold:
        fold_all(model, [(module, slot) for module, slot, _ in kept], optimizer)
    model_state(model).generation += 1
    settle(model)
    return tuple(slot.seed for _, slot, _ in kept)


def fold_all(model: nn.Module, slots: list[tuple[nn.Module, Slot]], optimizer: Optimizers | None) -> None:
    """Fold each of these blocks that can be, the last layers first: a pair folds once nothing else needs its width."""
    across = [(m, s) for m, s in slots if s.output_site not in (None, state_of(m).name)]
    within = [(m, s) for m, s in slots if s.output_site in (None, state_of(m).name)]
    for module, slot in [*within, *reversed(across)]:
        if slot.kernel is None:
            continue
        plan = plan_fold(model, module, slot, optimizer)
        if not isinstance(plan, Fold):
            slot.stays = plan
            continue
        parameters = uproot(module, slot)
        plan.apply(optimizer)
        if optimizer is not None:
            leave(optimizer, parameters)
        slot.folded, slot.fold_difference, slot.stays = True, plan.difference, None
        model_state(model).graph = None


def set_alpha(model: nn.Module, site: str, seed: int, alpha: float) -> None:
    """How much of a block counts, 0 to 1. At 0 it is not computed and gets no gradient.
    Raises GrowthError ESP-431, ESP-437 (nothing grown there, alpha out of range)."""
    slot = slot_of(state_of(site_named(model, site)), seed)
    _check_alpha(alpha)
    if slot.kernel is None:
        raise GrowthError("ESP-437", f"seed {seed} of '{site}' is {slot.seed.state}: it has no alpha")
    slot.alpha = float(alpha)
    settle(model)


def set_state(model: nn.Module, site: str, seed: int, state: SeedState) -> Seed:
    """Move a seed by the lifecycle table and return its record; CULLED to DORMANT frees the slot.
    Raises GrowthError ESP-437 for a move that is not in the table or that needs `attach` or `cull`."""
    slot = slot_of(state_of(site_named(model, site)), seed)
    record = moved(slot.seed, state)
    if (state is SeedState.TRAINING or state is SeedState.GRAFTING) and slot.kernel is None:
        raise GrowthError("ESP-437", f"seed {seed} of '{site}' has no kernel that could be {state}", hint="attach one")
    if state is SeedState.CULLED and slot.kernel is not None:
        raise GrowthError("ESP-437", f"seed {seed} of '{site}' has a kernel in the model", hint="use cull")
    slot.seed = record
    if state is SeedState.DORMANT:
        slot.seed = Seed(site=record.site, index=record.index, generation=record.generation + 1)
    return slot.seed


def _live_slots(model: nn.Module, site: str | None, seed: int | None) -> list[tuple[nn.Module, Slot]]:
    modules = sites_of(model).values() if site is None else [site_named(model, site)]
    if seed is not None and site is not None:
        slot = slot_of(state_of(site_named(model, site)), seed)
        return [(module, slot) for module in modules if slot.kernel is not None and slot.seed.state in LIVE]
    return [(m, s) for m in modules for s in state_of(m).slots if s.kernel is not None and s.seed.state in LIVE]


def _check_materialised(model: nn.Module, module: nn.Module) -> None:
    if host_device(model, module).type == "meta":
        raise GrowthError(
            "ESP-432",
            f"'{state_of(module).name}' is on the meta device: there is nothing yet to grow beside",
            hint="materialise the model first (to_empty and load_state_dict)",
        )


def _stored(kernel: KernelFiles | KernelModule | str) -> KernelModule:
    if isinstance(kernel, KernelModule):
        return kernel
    if isinstance(kernel, KernelFiles):
        return load_kernel(kernel, kernel.digest)
    if not isinstance(kernel, str):
        raise GrowthError(
            "ESP-434", f"a {type(kernel).__name__} is no kernel", hint="give its files, a loaded one, or its digest"
        )
    held = kernel_cache().get(kernel)
    if held is None:
        raise NotFoundError("ESP-430", f"no kernel {kernel[:19]} is in this process's cache", hint="give its files")
    return held


def _check_alpha(alpha: float) -> None:
    if not 0.0 <= alpha <= 1.0:
        raise GrowthError("ESP-437", f"alpha is {alpha!r}, must be from 0 to 1")


def _weights_seed(seed: Seed) -> int:
    name = f"{seed.site}/{seed.index}/{seed.generation}".encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:4], "big")
