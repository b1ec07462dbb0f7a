"""From a blueprint and a site to a built kernel, and from stored bytes to a trainable one.

Deterministic: (blueprint, site, hyperparameters, seed, samples, initialiser, host weights) give the same bytes at one
thread count. Nothing is allocated before the budgets have been checked, and no global random generator is touched.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from esper.contracts.assets import ArtifactRef
from esper.contracts.assets import Scalar
from esper.contracts.assets import SiteContract
from esper.contracts.base import Digest
from esper.runtime.tezzeret.artifact import KernelFiles
from esper.runtime.tezzeret.artifact import digest_of
from esper.runtime.tezzeret.artifact import manifest_bytes
from esper.runtime.tezzeret.artifact import verified_tensors
from esper.runtime.tezzeret.artifact import weights_bytes
from esper.runtime.tezzeret.blueprints.registry import get_blueprint
from esper.runtime.tezzeret.blueprints.registry import kernel_graph
from esper.runtime.tezzeret.blueprints.registry import resolve_hyperparameters
from esper.runtime.tezzeret.initialisers import DEFAULT
from esper.runtime.tezzeret.initialisers import HostWeights
from esper.runtime.tezzeret.initialisers import first_weights
from esper.runtime.tezzeret.ir import KernelGraph
from esper.runtime.tezzeret.ir import TypedGraph
from esper.runtime.tezzeret.ir import check_graph
from esper.runtime.tezzeret.manifest import KernelManifest
from esper.runtime.tezzeret.manifest import TensorSpec
from esper.runtime.tezzeret.module import TORCH_DTYPES
from esper.runtime.tezzeret.module import KernelModule
from esper.runtime.tezzeret.samples import SiteSamples
from esper.runtime.tezzeret.samples import check_samples

__all__ = ["HostWeights", "KernelModule", "SiteSamples", "build_kernel", "files_of", "load_kernel"]


def build_kernel(
    blueprint: str,
    site: SiteContract,
    hyperparameters: Mapping[str, Scalar],
    *,
    seed: int,
    samples: SiteSamples | None,
    max_parameters: int,
    max_flops: int | None = None,
    initialiser: str = DEFAULT,
    host: HostWeights | None = None,
) -> KernelFiles:
    """Build one kernel.

    Raises BlueprintError ESP-410..423; ESP-416 when it would have more than `max_parameters`, or take more than
    `max_flops` floating point operations for one sample forward; ESP-428 for an unknown `initialiser` or one that
    lacks what it needs.
    """
    resolved = resolve_hyperparameters(blueprint, site, hyperparameters)
    graph = kernel_graph(blueprint, site, resolved, max_parameters=max_parameters, max_flops=max_flops)
    return files_of(
        graph,
        site,
        seed=seed,
        samples=samples,
        blueprint=blueprint,
        hyperparameters=resolved,
        initialiser=initialiser,
        host=host,
    )


def files_of(
    graph: KernelGraph,
    site: SiteContract,
    *,
    seed: int,
    samples: SiteSamples | None,
    blueprint: str,
    hyperparameters: Mapping[str, Scalar],
    blueprint_version: int | None = None,
    initialiser: str = DEFAULT,
    host: HostWeights | None = None,
) -> KernelFiles:
    """The files of a graph with its first weights. Without `blueprint_version` the blueprint must be registered.

    Raises BlueprintError ESP-410..418 (the graph), ESP-414, ESP-417 (the samples), ESP-428 (the initialiser).
    """
    typed = check_graph(graph)
    if samples is not None:
        check_samples(samples, site)
    born = first_weights(typed, seed=seed, samples=samples, initialiser=initialiser, host=host)
    stored = {name: tensor.to(TORCH_DTYPES[site.dtype]) for name, tensor in born.tensors.items()}
    stored |= _buffers(typed, TORCH_DTYPES[site.dtype])
    weights = weights_bytes(stored)
    layout = typed.stored(site.dtype)
    manifest = KernelManifest(
        blueprint=blueprint,
        blueprint_version=get_blueprint(blueprint).version if blueprint_version is None else blueprint_version,
        hyperparameters=dict(hyperparameters),
        site=site,
        graph=graph,
        tensors=tuple(TensorSpec(name=name, dtype=layout[name][0], shape=layout[name][1]) for name in sorted(stored)),
        weights=ArtifactRef(digest=digest_of(weights), size_bytes=len(weights)),
        seed=seed,
        initialisation=born.initialisation,
        preserves=born.preserves,
        parameter_count=typed.parameter_count,
    )
    return KernelFiles(manifest_bytes(manifest), weights)


def load_kernel(files: KernelFiles, expected_digest: Digest) -> KernelModule:
    """Verify, then build a private trainable copy on the CPU. Raises IntegrityError ESP-401..405."""
    manifest, tensors = verified_tensors(files, expected_digest)
    return KernelModule(manifest, files.digest, tensors)


def _buffers(typed: TypedGraph, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: torch.full(buffer.shape, buffer.value, dtype=torch.int64 if buffer.counts else dtype, device="cpu")
        for name, buffer in typed.buffers().items()
    }
