"""From a blueprint and a site to a built kernel, and from stored bytes to a trainable one.

Deterministic: (blueprint, site, hyperparameters, seed, samples) give the same bytes at one thread count. Nothing is
allocated before the parameter budget has been checked, and no global random generator is touched.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from esper.contracts.assets import ArtifactRef
from esper.contracts.assets import Scalar
from esper.contracts.assets import SiteContract
from esper.contracts.base import Digest
from esper.runtime.tezzeret import alignment
from esper.runtime.tezzeret.artifact import KernelFiles
from esper.runtime.tezzeret.artifact import digest_of
from esper.runtime.tezzeret.artifact import manifest_bytes
from esper.runtime.tezzeret.artifact import verified_tensors
from esper.runtime.tezzeret.artifact import weights_bytes
from esper.runtime.tezzeret.blueprints import get_blueprint
from esper.runtime.tezzeret.blueprints import kernel_graph
from esper.runtime.tezzeret.blueprints import resolve_hyperparameters
from esper.runtime.tezzeret.ir import INPUT
from esper.runtime.tezzeret.ir import KernelGraph
from esper.runtime.tezzeret.ir import TypedGraph
from esper.runtime.tezzeret.ir import TypedNode
from esper.runtime.tezzeret.ir import check_graph
from esper.runtime.tezzeret.manifest import KernelManifest
from esper.runtime.tezzeret.manifest import TensorSpec
from esper.runtime.tezzeret.module import TORCH_DTYPES
from esper.runtime.tezzeret.module import KernelModule
from esper.runtime.tezzeret.samples import SiteSamples
from esper.runtime.tezzeret.samples import check_samples

__all__ = ["KernelModule", "SiteSamples", "build_kernel", "files_of", "initialise", "load_kernel"]


def build_kernel(
    blueprint: str,
    site: SiteContract,
    hyperparameters: Mapping[str, Scalar],
    *,
    seed: int,
    samples: SiteSamples | None,
    max_parameters: int,
) -> KernelFiles:
    """Build one kernel. Raises BlueprintError ESP-410..423; ESP-416 when it would have more than `max_parameters`."""
    resolved = resolve_hyperparameters(blueprint, site, hyperparameters)
    graph = kernel_graph(blueprint, site, resolved)
    check_graph(graph, max_parameters=max_parameters)
    if samples is not None:
        check_samples(samples, site)
    return files_of(graph, site, seed=seed, samples=samples, blueprint=blueprint, hyperparameters=resolved)


def files_of(
    graph: KernelGraph,
    site: SiteContract,
    *,
    seed: int,
    samples: SiteSamples | None,
    blueprint: str,
    hyperparameters: Mapping[str, Scalar],
) -> KernelFiles:
    """The files of a graph with its first weights (`initialise`). The blueprint must be registered."""
    typed = check_graph(graph)
    tensors, aligned = initialise(typed, seed=seed, samples=samples)
    stored = {name: tensor.to(TORCH_DTYPES[site.dtype]) for name, tensor in tensors.items()}
    weights = weights_bytes(stored)
    manifest = KernelManifest(
        blueprint=blueprint,
        blueprint_version=get_blueprint(blueprint).version,
        hyperparameters=dict(hyperparameters),
        site=site,
        graph=graph,
        tensors=tuple(
            TensorSpec(name=name, dtype=site.dtype, shape=tuple(stored[name].shape)) for name in sorted(stored)
        ),
        weights=ArtifactRef(digest=digest_of(weights), size_bytes=len(weights)),
        seed=seed,
        initialisation="residual" if aligned else "kaiming",
        parameter_count=typed.parameter_count,
    )
    return KernelFiles(manifest_bytes(manifest), weights)


def load_kernel(files: KernelFiles, expected_digest: Digest) -> KernelModule:
    """Verify, then build a private trainable copy on the CPU. Raises IntegrityError ESP-401..405."""
    manifest, tensors = verified_tensors(files, expected_digest)
    return KernelModule(manifest, files.digest, tensors)


def initialise(typed: TypedGraph, *, seed: int, samples: SiteSamples | None) -> tuple[dict[str, Tensor], bool]:
    """First weights, float64, and whether the first operation could be aligned with the samples.

    The last operation that has tensors is zero; the first one that reads `x` is aligned with the residual
    functional gradient (without usable samples: Kaiming uniform, zero bias); all others are Kaiming uniform.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    trainable = [node for node in typed.nodes if node.tensors()]
    tensors: dict[str, Tensor] = {}
    aligned = False
    for node in trainable:
        activation = _activation_after(node, typed)
        values: Mapping[str, Tensor] | None = None
        if node is trainable[-1]:
            values = {name: _zeros(shape) for name, shape in node.tensors().items()}
        elif not aligned and samples is not None and node.inputs == (INPUT,):
            values = _aligned(node, activation, samples, generator)
            aligned = values is not None
        if values is None:
            gain = 1.0 if activation is None else alignment.GAINS[activation]
            values = {
                name: alignment.kaiming_uniform(shape, gain, generator) if len(shape) > 1 else _zeros(shape)
                for name, shape in node.tensors().items()
            }
        tensors |= {f"{node.id}.{name}": value for name, value in values.items()}
    return tensors, aligned


def _aligned(
    node: TypedNode, activation: str | None, samples: SiteSamples, generator: torch.Generator
) -> dict[str, Tensor] | None:
    shapes = node.tensors()
    x, g = samples.x.detach().cpu(), samples.g.detach().cpu()
    if node.op == "linear":
        rows = alignment.linear_rows(x, g, generator)
    elif node.op == "conv2d" and node.attributes.groups == 1:
        rows = alignment.conv2d_rows(x, g, node.attributes, generator)
    else:
        return None
    units = shapes["weight"][0]
    found = alignment.aligned_rows(rows, min(units, alignment.MAX_ALIGNED), activation, generator)
    if found is None:
        return None
    weight, bias = found[0].reshape(-1, *shapes["weight"][1:]), found[1]
    others = units - weight.shape[0]
    if others:
        gain = 1.0 if activation is None else alignment.GAINS[activation]
        rest = alignment.kaiming_uniform((others, *weight.shape[1:]), gain, generator)
        weight, bias = torch.cat((weight, rest)), torch.cat((bias, _zeros((others,))))
    return {"weight": weight} | ({"bias": bias} if "bias" in shapes else {})


def _activation_after(node: TypedNode, typed: TypedGraph) -> str | None:
    following = (other for other in typed.nodes if node.id in other.inputs and other.op == "activation")
    return next((str(other.attributes.name) for other in following), None)


def _zeros(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device="cpu")
