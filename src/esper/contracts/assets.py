"""What Urza keeps: seeds, blueprints, kernels and the references between them."""

from typing import Annotated
from typing import Literal

from pydantic import Field
from pydantic import JsonValue

from esper.contracts.base import Contract
from esper.contracts.base import Digest
from esper.contracts.base import SiteName
from esper.contracts.enums import BlueprintState
from esper.contracts.enums import KernelState
from esper.contracts.enums import SeedState

Scalar = Annotated[int, Field(strict=True)] | Annotated[float, Field(strict=True)] | str | bool
Hyperparameters = dict[str, Scalar]
"""What a blueprint function is called with: names to plain scalars."""


class ArtifactRef(Contract):
    """Where bytes are and what they must be: the digest is the address."""

    digest: Digest
    size_bytes: Annotated[int, Field(ge=0)]


class SiteContract(Contract):
    """What a kernel must know of its site, and nothing of the model around it.

    `input_shape` and `output_shape` are the shapes of one sample of the layer that is read and of the
    layer that is added to (without the batch dimension); `attributes` are the geometry of the host
    layer, such as the kernel size, stride and padding of a convolution. A kernel that `reads` the output takes
    what the layer (and the seeds before it) computed in place of the layer's input: `input_shape` is then the
    shape of that.
    """

    site: SiteName
    output_site: SiteName
    kind: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    dtype: str
    reads: Literal["input", "output"] = "input"
    attributes: dict[str, JsonValue] = Field(default_factory=dict)


class Seed(Contract):
    """One slot beside one layer. `generation` rises whenever the slot is freed, so that a late kernel is stale."""

    site: SiteName
    index: Annotated[int, Field(ge=0)]
    generation: Annotated[int, Field(ge=0)] = 0
    state: SeedState = SeedState.DORMANT
    blueprint: str | None = None
    kernel: Digest | None = None
    adaptation_id: str | None = None
    parameters: Annotated[int, Field(ge=0)] = 0
    born_step: Annotated[int, Field(ge=0)] | None = None


class Blueprint(Contract):
    """A recipe for kernels: a registered function of a site contract and hyperparameters that returns IR, or one that
    was submitted as data: then `graph` is the template of its IR."""

    name: str
    version: Annotated[int, Field(ge=1)] = 1
    description: str
    formula: str
    host_kinds: tuple[str, ...]
    defaults: Hyperparameters
    capacity_free: bool = False
    """True for controls: on a trainable full-rank host such a kernel adds nothing."""
    state: BlueprintState = BlueprintState.VALIDATED
    reads: Literal["input", "output"] = "input"
    graph: dict[str, JsonValue] | None = None


class Certificate(Contract):
    """The birth certificate of a kernel: measured facts, and the checks they passed or failed.

    Differences are maximum absolute values; `drift` is relative to the root mean square of the host's
    output; latencies are medians in microseconds on the forge and are never an input to a decision.
    """

    kernel: Digest
    passed: bool
    failures: tuple[str, ...] = ()
    birth_difference: Annotated[float, Field(ge=0)]
    first_step_drift: Annotated[float, Field(ge=0)]
    parameters_with_gradient: Annotated[int, Field(ge=0)]
    parameters_total: Annotated[int, Field(ge=0)]
    parameter_count: Annotated[int, Field(ge=0)]
    flops_per_sample: Annotated[int, Field(ge=0)]
    host_flops_per_sample: Annotated[int, Field(ge=0)]
    forward_us: Annotated[float, Field(ge=0)]
    host_forward_us: Annotated[float, Field(ge=0)]
    compiled: Literal["parity", "unavailable", "off"]
    compiled_difference: Annotated[float, Field(ge=0)] | None = None
    torch_version: str
    forge: str
    birth_bound: Annotated[float, Field(ge=0)] = 0.0
    """The largest birth difference that this kernel may have: 0, unless a normalisation stands in the way."""
    backward_difference: Annotated[float, Field(ge=0)] | None = None
    """Largest change, by the graft, of the gradient that passes on to the layers below, relative to its largest."""
    neighbour_state_kept: bool | None = None
    """Whether the weights and the optimizer's state of a trained neighbour go on to the bit as without the graft."""
    first_step_change: Annotated[float, Field(ge=0)] | None = None
    """Largest absolute change of the output after one step of `optimizer`."""
    autocast: dict[str, Literal["finite", "not finite", "unavailable"]] = Field(default_factory=dict)
    """Precision of mixed training to what came of a forward and backward in it."""
    parameter_bytes: Annotated[int, Field(ge=0)] | None = None
    optimizer_bytes: Annotated[int, Field(ge=0)] | None = None
    peak_bytes_per_sample: Annotated[int, Field(ge=0)] | None = None
    """Bytes of parameters and buffers; what `optimizer` keeps of them; the most that lives between the operations of a
    forward and backward for one more sample. All three are counted, so they repeat."""
    optimizer: str | None = None
    reference: str | None = None
    """What drift and latency are relative to: `host`, or the kind of the plain layer in its place."""

    @property
    def relative_latency(self) -> float:
        """Forward time of the kernel over that of the host or the plain layer in its place."""
        return self.forward_us / self.host_forward_us if self.host_forward_us else 0.0


class Kernel(Contract):
    """A built kernel: its digest is the sha256 of its manifest, which binds the weights."""

    digest: Digest
    blueprint: str
    hyperparameters: Hyperparameters
    site: SiteContract
    manifest: ArtifactRef
    weights: ArtifactRef
    certificate: ArtifactRef | None = None
    parameter_count: Annotated[int, Field(ge=0)]
    state: KernelState = KernelState.BUILT
