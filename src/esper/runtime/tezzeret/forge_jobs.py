"""What a child of the forge can be asked to do: data in, data out."""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from esper.contracts.assets import Hyperparameters
from esper.contracts.assets import SiteContract
from esper.contracts.config import OptimizerConfig
from esper.runtime.tezzeret.artifact import KernelFiles
from esper.runtime.tezzeret.build import files_of
from esper.runtime.tezzeret.certify import certify
from esper.runtime.tezzeret.frames import Message
from esper.runtime.tezzeret.ir import canonical_json
from esper.runtime.tezzeret.ir import parse_graph
from esper.runtime.tezzeret.samples import SiteSamples
from esper.runtime.tezzeret.samples import unpack_samples

SAMPLES = "site"
"""The one name in a file of samples for a child."""

_HYPERPARAMETERS: TypeAdapter[Hyperparameters] = TypeAdapter(Hyperparameters)


def build(header: Mapping[str, Any], blobs: list[bytes]) -> Message:
    """Header: graph, site, blueprint, blueprint_version, hyperparameters, seed, initialiser, max_parameters,
    max_flops. Byte strings: samples, if any. Gives manifest and weights. A child knows no blueprints: the graph is what
    a registered one made, and is checked here by all rules."""
    graph = parse_graph(header["graph"], max_parameters=header["max_parameters"], max_flops=header["max_flops"])
    files = files_of(
        graph,
        SiteContract.model_validate_json(canonical_json(header["site"])),
        seed=header["seed"],
        samples=_samples(blobs),
        blueprint=header["blueprint"],
        blueprint_version=header["blueprint_version"],
        hyperparameters=_HYPERPARAMETERS.validate_python(header["hyperparameters"]),
        initialiser=header["initialiser"],
    )
    return {}, [files.manifest, files.weights]


def certificate(header: Mapping[str, Any], blobs: list[bytes]) -> Message:
    """Header: optimizer, compile. Byte strings: manifest, weights and samples, if any. Gives the certificate."""
    settings = header["optimizer"]
    result = certify(
        KernelFiles(blobs[0], blobs[1]),
        samples=_samples(blobs[2:]),
        optimizer=None if settings is None else OptimizerConfig.model_validate_json(canonical_json(settings)),
        compile=header["compile"],
    )
    return {"certificate": result.model_dump(mode="json")}, []


JOBS: Mapping[str, Callable[[Mapping[str, Any], list[bytes]], Message]] = {
    "build": build,
    "certify": certificate,
}


def _samples(blobs: list[bytes]) -> SiteSamples | None:
    return unpack_samples(blobs[0])[SAMPLES] if blobs else None
