"""The manifest of a kernel: the contract that binds what it is to what its weights are. No torch is imported."""

from typing import Annotated
from typing import Literal

from pydantic import Field

from esper.contracts.assets import ArtifactRef
from esper.contracts.assets import Hyperparameters
from esper.contracts.assets import SiteContract
from esper.contracts.base import Contract
from esper.runtime.tezzeret.ir import KernelGraph

MAX_MANIFEST_BYTES = 256 * 1024


class TensorSpec(Contract):
    """One tensor or buffer: `<node>.<tensor>`, its dtype as `float32`, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class KernelManifest(Contract):
    """Everything that a kernel is, but for the numbers in its tensors, which `weights` names by digest and size.

    The sha256 of its canonical JSON is the kernel's digest. Nothing in it varies between two builds of the same
    thing: no clock, no host, no versions of libraries (those are in the certificate).
    """

    schema_version: Literal[1] = 1
    blueprint: str
    blueprint_version: Annotated[int, Field(ge=1)]
    hyperparameters: Hyperparameters
    site: SiteContract
    graph: KernelGraph
    tensors: tuple[TensorSpec, ...]
    """Sorted by name: the order of the weights file."""
    weights: ArtifactRef
    seed: Annotated[int, Field(ge=0)]
    initialisation: str
    """The initialiser that gave the first weights (`initialisers`), not the one that was asked for: `residual` (the
    first operation was aligned with the residual functional gradient of shipped samples) falls back to `kaiming`."""
    preserves: bool = True
    """False for a baseline that changes the function at birth: such a kernel may only be grafted with alpha 0."""
    parameter_count: Annotated[int, Field(ge=0)]
