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
from esper.runtime.kasmina.growing.between import pair_norms
from esper.runtime.kasmina.growing.folding.obstacles import is_transposed
from esper.runtime.kasmina.growing.folding.obstacles import output_width
from esper.runtime.kasmina.growing.slots import plant
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.wrapping.hosts import host_device
from esper.runtime.kasmina.wrapping.hosts import private_parameters
from esper.runtime.kasmina.wrapping.morphable import model_state
from esper.runtime.kasmina.wrapping.morphable import settle
from esper.runtime.kasmina.wrapping.morphable import sites_of
from esper.runtime.kasmina.wrapping.places import Way
from esper.runtime.tezzeret.artifact import KernelFiles
from esper.runtime.tezzeret.artifact import digest_of
from esper.runtime.tezzeret.build import KernelModule
from esper.runtime.tezzeret.build import load_kernel
from esper.runtime.tezzeret.ir import check_graph
from esper.runtime.tezzeret.manifest import KernelManifest
from esper.runtime.tezzeret.manifest import TensorSpec
from esper.runtime.tezzeret.module import TORCH_DTYPES

Shape = tuple[int, ...]


class GrownSeed(Contract):
    """One seed as a model holds it. `kernel_manifest` is the kernel's own manifest, whose sha256 is `seed.kernel`."""

    seed: Seed
    alpha: Annotated[float, Field(ge=0, le=1)] = 1.0
    folded: bool = False
    fold_difference: float | None = None
    """The largest change of the output that the fold made, measured on a seeded batch."""
    stays: str | None = None
    """Why the block was not folded when it was kept."""
    kernel_manifest: str | None = None


class GrownSite(Contract):
    """One site with all its seeds. Shapes are of one sample, None where the layer has not been called."""

    site: SiteName
    kind: str
    input_shape: Shape | None
    output_shape: Shape | None
    dtype: str | None = None
    """Of the output that was seen: what counts where a site has no weights."""
    reads_at: Way | None = None
    returns_at: Way = ()
    parameter_shapes: dict[str, Shape]
    """Of the host's own parameters: a folded `widen` has made some longer than the base's."""
    seeds: tuple[GrownSeed, ...]


class GrowthManifest(Contract):
    """The grown structure of a model, without a single weight."""

    seeds_per_layer: Annotated[int, Field(ge=1, le=64)]
    generation: Annotated[int, Field(ge=0)]
    read_elsewhere: tuple[SiteName, ...] | None = None
    """Sites whose weights the model reads outside of their own forward too; None where that was not seen."""
    sites: tuple[GrownSite, ...]


def growth_manifest(model: nn.Module) -> GrowthManifest:
    """The structure that has grown in a wrapped model. Raises SiteError ESP-314 for one that is not wrapped."""
    state = model_state(model)
    sites = []
    for name, module in sites_of(model).items():
        site = state_of(module)
        seeds = tuple(
            GrownSeed(
                seed=slot.seed,
                alpha=slot.alpha,
                folded=slot.folded,
                fold_difference=slot.fold_difference,
                stays=slot.stays,
                kernel_manifest=slot.manifest,
            )
            for slot in site.slots
        )
        sites.append(
            GrownSite(
                site=name,
                kind=site.kind,
                input_shape=site.input_shape,
                output_shape=site.output_shape,
                dtype=site.dtype,
                reads_at=site.reads_at,
                returns_at=site.returns_at,
                parameter_shapes=_host_shapes(module),
                seeds=seeds,
            )
        )
    elsewhere = None if state.read_elsewhere is None else tuple(sorted(state.read_elsewhere))
    return GrowthManifest(
        seeds_per_layer=state.seeds_per_layer,
        generation=state.generation,
        read_elsewhere=elsewhere,
        sites=tuple(sites),
    )


def rebuild(model: nn.Module, manifest: GrowthManifest, kernels: Mapping[str, KernelFiles] | None = None) -> None:
    """Put a grown structure onto a freshly wrapped model, before its state dict is loaded.

    Kernels that are in `kernels` (by digest) get the weights they were born with, all others zeros. Everything is
    checked before anything is changed. Raises IntegrityError ESP-404 (a damaged kernel manifest), ESP-408 (of
    another architecture).
    """
    sites = sites_of(model)
    longer = longer_tensors(manifest, model)
    built: dict[tuple[str, int], KernelModule] = {}
    for grown in manifest.sites:
        module = sites.get(grown.site)
        if module is None or state_of(module).kind != grown.kind:
            raise IntegrityError("ESP-408", f"the model has no {grown.kind} site '{grown.site}': another architecture")
        if len(grown.seeds) != len(state_of(module).slots) or any(s.kernel is not None for s in state_of(module).slots):
            raise IntegrityError("ESP-408", f"'{grown.site}' has other seeds: wrap a fresh base with the same number")
        expected = _expected_shapes(module, longer)
        if expected != grown.parameter_shapes:
            raise IntegrityError(
                "ESP-408",
                f"'{grown.site}' has parameters {_host_shapes(module)}, the grown model has {grown.parameter_shapes}",
            )
        for seed in grown.seeds:
            if seed.kernel_manifest is not None and not seed.folded:
                kernel = _built(seed, kernels or {})
                built[grown.site, seed.seed.index] = kernel.to(host_device(model, module)).train(module.training)
    modules = dict(model.named_modules())
    for name, shapes in longer.items():
        _lengthen(modules[name], shapes)
    for grown in manifest.sites:
        module = sites[grown.site]
        state = state_of(module)
        state.input_shape, state.output_shape = grown.input_shape, grown.output_shape
        state.dtype, state.reads_at, state.returns_at = grown.dtype, grown.reads_at, grown.returns_at
        for slot, seed in zip(state.slots, grown.seeds, strict=True):
            _restore(module, slot, seed, built.get((grown.site, seed.seed.index)))
    model_state(model).generation = manifest.generation
    model_state(model).graph = None
    if manifest.read_elsewhere is not None:
        model_state(model).read_elsewhere = frozenset(manifest.read_elsewhere)
    settle(model)


def _restore(module: nn.Module, slot: Slot, grown: GrownSeed, kernel: KernelModule | None) -> None:
    if kernel is not None:
        text = grown.kernel_manifest or ""
        plant(module, slot, kernel, manifest=text, record=grown.seed, alpha=grown.alpha)
    slot.seed = grown.seed
    slot.alpha = grown.alpha
    slot.folded, slot.fold_difference, slot.stays = grown.folded, grown.fold_difference, grown.stays
    slot.manifest = grown.kernel_manifest


def _built(grown: GrownSeed, kernels: Mapping[str, KernelFiles]) -> KernelModule:
    digest = str(grown.seed.kernel)
    if digest in kernels:
        return load_kernel(kernels[digest], digest)
    try:
        manifest = _kernel_manifest(grown)
        dtypes = {**TORCH_DTYPES, "int64": torch.int64}
        tensors = {
            spec.name: torch.zeros(spec.shape, dtype=dtypes[spec.dtype], device="cpu") for spec in manifest.tensors
        }
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


def grown_tensors(manifest: GrowthManifest) -> dict[str, TensorSpec]:
    """The tensors of every block that is in the model as a block, by their names in its `state_dict()`.
    Raises IntegrityError ESP-404 for a damaged kernel manifest."""
    tensors: dict[str, TensorSpec] = {}
    for grown in manifest.sites:
        for seed in grown.seeds:
            if seed.kernel_manifest is not None and not seed.folded:
                for spec in _kernel_manifest(seed).tensors:
                    tensors[f"{grown.site}.kasmina.{seed.seed.index}.{spec.name}"] = spec
    return tensors


def _host_shapes(module: nn.Module) -> dict[str, Shape]:
    return {name: tuple(p.shape) for name, p in private_parameters(module)}


def longer_tensors(manifest: GrowthManifest, base: nn.Module) -> dict[str, dict[str, Shape]]:
    """Module -> the shapes of its parameters and buffers that folds have made longer than those of `base`, or added:
    units of pairs that were widened for good, and biases that came with what was folded. BatchNorms between two layers
    are here too, whether they are sites or not.

    Raises IntegrityError ESP-404 for a damaged kernel manifest, ESP-408 for a base without these modules.
    """
    modules = dict(base.named_modules())
    added = _added_units(manifest)
    folded = {grown.site: grown.parameter_shapes for grown in manifest.sites if any(s.folded for s in grown.seeds)}
    found: dict[str, dict[str, Shape]] = {}
    for name in {**added, **folded}:
        module = modules.get(name)
        if module is None:
            raise IntegrityError("ESP-408", f"the model has no '{name}': another architecture")
        outputs, inputs = added.get(name, (0, 0))
        shapes = _longer_shapes(module, outputs, inputs)
        if name in folded and "bias" in folded[name] and module._parameters.get("bias", False) is None:
            shapes["bias"] = _bias_shape(module, outputs)
        if shapes:
            found[name] = shapes
    return found


def _added_units(manifest: GrowthManifest) -> dict[str, tuple[int, int]]:
    """Module -> how many (outputs, inputs) it has more than in the base."""
    added: dict[str, tuple[int, int]] = {}
    for grown in manifest.sites:
        for seed in grown.seeds:
            if not seed.folded or seed.kernel_manifest is None:
                continue
            kernel = _kernel_manifest(seed)
            if kernel.site.output_site == kernel.site.site:
                continue
            first = check_graph(kernel.graph).nodes[0]
            units = first.tensors()["weight"][0]
            for name in (kernel.site.site, *pair_norms(kernel.site)):
                outputs, inputs = added.get(name, (0, 0))
                added[name] = (outputs + units, inputs)
            outputs, inputs = added.get(kernel.site.output_site, (0, 0))
            added[kernel.site.output_site] = (outputs, inputs + units)
    return added


def _longer_shapes(module: nn.Module, outputs: int, inputs: int) -> dict[str, Shape]:
    if not outputs and not inputs:
        return {}
    own = {**module._parameters, **module._buffers}
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items() if tensor is not None and tensor.dim()}
    if is_transposed(module):
        inputs, outputs = outputs, inputs
    longer = {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            longer[name] = (shape[0] + outputs, shape[1] + inputs, *shape[2:])
        else:
            longer[name] = (shape[0] + (inputs if is_transposed(module) else outputs),)
    return longer


def _bias_shape(module: nn.Module, outputs: int) -> Shape:
    weight = module._parameters["weight"]
    assert weight is not None
    if weight.dim() == 1 or isinstance(module, nn.LayerNorm):
        return tuple(weight.shape)
    return (output_width(module) + outputs,)


def _expected_shapes(module: nn.Module, longer: Mapping[str, Mapping[str, Shape]]) -> dict[str, Shape]:
    """The shapes that a site's own parameters have in the grown model."""
    site = state_of(module).name
    expected = _host_shapes(module)
    for owner, shapes in longer.items():
        if owner == site:
            expected |= {name: shape for name, shape in shapes.items() if name in module._parameters}
        elif owner.startswith(f"{site}."):
            inside = owner.removeprefix(f"{site}.")
            expected |= {f"{inside}.{n}": s for n, s in shapes.items() if f"{inside}.{n}" in expected}
    return expected


def _lengthen(module: nn.Module, shapes: Mapping[str, Shape]) -> None:
    """Give a module tensors of these shapes, and settings that go with them."""
    weight = module._parameters.get("weight")
    for name, shape in shapes.items():
        if name in module._buffers:
            buffer = module._buffers[name]
            assert buffer is not None
            module._buffers[name] = buffer.new_zeros(shape)
            continue
        old = module._parameters[name]
        if old is None or tuple(old.shape) != shape:
            like = weight if old is None else old
            assert like is not None
            module._parameters[name] = nn.Parameter(like.new_zeros(shape), requires_grad=like.requires_grad)
    settings: tuple[tuple[str, ...], ...] = (("out_features", "out_channels"), ("in_features", "in_channels"))
    if is_transposed(module):
        settings = (("nx",), ("nf",))
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.num_features = next(iter(shapes.values()))[0]
    elif "weight" in shapes:
        for names, size in zip(settings, shapes["weight"], strict=False):
            for name in names:
                if hasattr(module, name):
                    setattr(module, name, size)
