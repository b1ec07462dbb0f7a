"""What has grown in a model as data, and the same structure put onto a freshly wrapped base again."""

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from pydantic import ValidationError
from torch import nn

from esper.contracts.assets import Seed
from esper.contracts.base import Contract
from esper.contracts.base import SiteName
from esper.errors import BlueprintError
from esper.errors import IntegrityError
from esper.runtime.kasmina.bank import Slot
from esper.runtime.kasmina.growing.slots import plant
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.wrapping.hosts import host_weight
from esper.runtime.kasmina.wrapping.morphable import model_state
from esper.runtime.kasmina.wrapping.morphable import settle
from esper.runtime.kasmina.wrapping.morphable import sites_of
from esper.runtime.tezzeret.artifact import KernelFiles
from esper.runtime.tezzeret.artifact import digest_of
from esper.runtime.tezzeret.build import KernelModule
from esper.runtime.tezzeret.build import load_kernel
from esper.runtime.tezzeret.ir import check_graph
from esper.runtime.tezzeret.manifest import KernelManifest
from esper.runtime.tezzeret.module import TORCH_DTYPES

Shape = tuple[int, ...]


class GrownSeed(Contract):
    """One seed as a model holds it. `kernel_manifest` is the kernel's own manifest, whose sha256 is `seed.kernel`."""

    seed: Seed
    alpha: Annotated[float, Field(ge=0, le=1)] = 1.0
    folded: bool = False
    kernel_manifest: str | None = None


class GrownSite(Contract):
    """One site with all its seeds. Shapes are of one sample, None where the layer has not been called."""

    site: SiteName
    kind: str
    input_shape: Shape | None
    output_shape: Shape | None
    parameter_shapes: dict[str, Shape]
    """Of the host's own parameters: a folded `widen` has made some longer than the base's."""
    seeds: tuple[GrownSeed, ...]


class GrowthManifest(Contract):
    """The grown structure of a model, without a single weight."""

    seeds_per_layer: Annotated[int, Field(ge=1, le=64)]
    generation: Annotated[int, Field(ge=0)]
    sites: tuple[GrownSite, ...]


def growth_manifest(model: nn.Module) -> GrowthManifest:
    """The structure that has grown in a wrapped model. Raises SiteError ESP-314 for one that is not wrapped."""
    state = model_state(model)
    sites = []
    for name, module in sites_of(model).items():
        site = state_of(module)
        seeds = tuple(
            GrownSeed(seed=slot.seed, alpha=slot.alpha, folded=slot.folded, kernel_manifest=slot.manifest)
            for slot in site.slots
        )
        sites.append(
            GrownSite(
                site=name,
                kind=site.kind,
                input_shape=site.input_shape,
                output_shape=site.output_shape,
                parameter_shapes=_host_shapes(module),
                seeds=seeds,
            )
        )
    return GrowthManifest(seeds_per_layer=state.seeds_per_layer, generation=state.generation, sites=tuple(sites))


def rebuild(model: nn.Module, manifest: GrowthManifest, kernels: Mapping[str, KernelFiles] | None = None) -> None:
    """Put a grown structure onto a freshly wrapped model, before its state dict is loaded.

    Kernels that are in `kernels` (by digest) get the weights they were born with, all others zeros. Everything is
    checked before anything is changed. Raises IntegrityError ESP-404 (a damaged kernel manifest), ESP-408 (of
    another architecture).
    """
    sites = sites_of(model)
    longer = added_units(manifest)
    built: dict[tuple[str, int], KernelModule] = {}
    for grown in manifest.sites:
        module = sites.get(grown.site)
        if module is None or state_of(module).kind != grown.kind:
            raise IntegrityError("ESP-408", f"the model has no {grown.kind} site '{grown.site}': another architecture")
        if len(grown.seeds) != len(state_of(module).slots) or any(s.kernel is not None for s in state_of(module).slots):
            raise IntegrityError("ESP-408", f"'{grown.site}' has other seeds: wrap a fresh base with the same number")
        expected = lengthened_shapes(_host_shapes(module), longer.get(grown.site), grown.parameter_shapes)
        if expected != grown.parameter_shapes:
            raise IntegrityError(
                "ESP-408",
                f"'{grown.site}' has parameters {_host_shapes(module)}, the grown model has {grown.parameter_shapes}",
            )
        for seed in grown.seeds:
            if seed.kernel_manifest is not None and not seed.folded:
                kernel = _built(seed, kernels or {})
                built[grown.site, seed.seed.index] = kernel.to(host_weight(module).device).train(module.training)
    for grown in manifest.sites:
        module = sites[grown.site]
        state = state_of(module)
        state.input_shape, state.output_shape = grown.input_shape, grown.output_shape
        if grown.site in longer:
            _lengthen(module, grown.parameter_shapes)
        for slot, seed in zip(state.slots, grown.seeds, strict=True):
            _restore(module, slot, seed, built.get((grown.site, seed.seed.index)))
    model_state(model).generation = manifest.generation
    model_state(model).graph = None
    settle(model)


def _restore(module: nn.Module, slot: Slot, grown: GrownSeed, kernel: KernelModule | None) -> None:
    if kernel is not None:
        text = grown.kernel_manifest or ""
        plant(module, slot, kernel, manifest=text, record=grown.seed, alpha=grown.alpha)
    slot.seed = grown.seed
    slot.alpha = grown.alpha
    slot.folded = grown.folded
    slot.manifest = grown.kernel_manifest


def _built(grown: GrownSeed, kernels: Mapping[str, KernelFiles]) -> KernelModule:
    digest = str(grown.seed.kernel)
    if digest in kernels:
        return load_kernel(kernels[digest], digest)
    try:
        manifest = _kernel_manifest(grown)
        dtype = TORCH_DTYPES[manifest.site.dtype]
        tensors = {spec.name: torch.zeros(spec.shape, dtype=dtype, device="cpu") for spec in manifest.tensors}
        return KernelModule(manifest, digest, tensors)
    except (BlueprintError, KeyError, RuntimeError) as error:
        raise IntegrityError("ESP-404", f"the kernel manifest of '{grown.seed.site}' is damaged: {error}") from error


def _kernel_manifest(grown: GrownSeed) -> KernelManifest:
    text = grown.kernel_manifest or ""
    digest = digest_of(text.encode())
    if digest != grown.seed.kernel:
        raise IntegrityError("ESP-404", f"the kernel manifest of '{grown.seed.site}' is {digest[:19]}, not the seed's")
    try:
        return KernelManifest.model_validate_json(text)
    except ValidationError as error:
        raise IntegrityError("ESP-404", f"the kernel manifest of '{grown.seed.site}' is damaged: {error}") from error


def _host_shapes(module: nn.Module) -> dict[str, Shape]:
    return {name: tuple(p.shape) for name, p in module.named_parameters() if not name.startswith("kasmina.")}


def added_units(manifest: GrowthManifest) -> dict[str, tuple[int, int]]:
    """Site -> how many (outputs, inputs) it has more than in the base, by pairs that were widened for good.
    Raises IntegrityError ESP-404 for a damaged kernel manifest."""
    added: dict[str, tuple[int, int]] = {}
    for grown in manifest.sites:
        for seed in grown.seeds:
            if not seed.folded or seed.kernel_manifest is None:
                continue
            kernel = _kernel_manifest(seed)
            if kernel.site.output_site == kernel.site.site:
                continue
            units = check_graph(kernel.graph).nodes[0].output[-1]
            outputs, inputs = added.get(kernel.site.site, (0, 0))
            added[kernel.site.site] = (outputs + units, inputs)
            outputs, inputs = added.get(kernel.site.output_site, (0, 0))
            added[kernel.site.output_site] = (outputs, inputs + units)
    return added


def lengthened_shapes(
    base: Mapping[str, Shape], added: tuple[int, int] | None, saved: Mapping[str, Shape]
) -> dict[str, Shape]:
    """What the parameters of a layer of the base are once its added units are in. New units may have brought a bias."""
    if added is None:
        return dict(base)
    outputs, inputs = base["weight"][0] + added[0], base["weight"][1] + added[1]
    shapes: dict[str, Shape] = {"weight": (outputs, inputs)}
    return shapes | {"bias": (outputs,)} if "bias" in base or "bias" in saved else shapes


def _lengthen(module: nn.Module, shapes: Mapping[str, Shape]) -> None:
    assert isinstance(module, nn.Linear)
    weight = module.weight
    for name, shape in shapes.items():
        old = module._parameters[name]
        if old is None or tuple(old.shape) != shape:
            trained = weight.requires_grad if old is None else old.requires_grad
            module._parameters[name] = nn.Parameter(weight.new_zeros(shape), requires_grad=trained)
    module.out_features, module.in_features = shapes["weight"]
