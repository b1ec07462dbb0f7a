"""What happens while a run lives: health, reports, decisions, facts, deliveries, heads."""

from typing import Annotated

from pydantic import Field

from esper.contracts.assets import ArtifactRef
from esper.contracts.assets import Hyperparameters
from esper.contracts.assets import Seed
from esper.contracts.assets import SiteContract
from esper.contracts.base import AdaptationId
from esper.contracts.base import Contract
from esper.contracts.base import Digest
from esper.contracts.base import RunId
from esper.contracts.base import SiteName
from esper.contracts.enums import AdaptationState
from esper.contracts.enums import DecisionKind
from esper.contracts.enums import EpochStatus
from esper.contracts.enums import FactKind
from esper.contracts.enums import Verdict

Count = Annotated[int, Field(ge=0)]
Ratio = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


class HealthSignal(Contract):
    """The health of one site over one window. A `None` was not measured: unknown is not healthy.

    The first block are the classic diagnostics; the second block is what decides. `saturation` is
    exp(entropy(s / sum s)) / width for the singular values s of the centred pre-activations (NORTH);
    `residual_gradient` is the share of the energy of dL/dy left after regressing out the layer's own
    input (TINY, SENN). `residual_gradient_norm` is the Frobenius norm of what is left, over
    `rows_seen` rows (one for each sample, or for each place of a convolution) of the gradient of the mean loss.
    `update_to_weight` is the norm of what one optimizer step changed over the norm of the weights, of the newest
    step that was measured. `gradient_signal_to_noise` is the squared norm of the mean gradient over the trace of the
    covariance of one sample's gradient (the inverse of McCandlish et al.'s simple noise scale, arXiv 1812.06162).
    """

    site: SiteName
    seed: Count = 0
    epoch: Count
    step: Count
    rows_seen: Count
    activation_mean: float | None = None
    activation_variance: NonNegative | None = None
    dead_neuron_ratio: Ratio | None = None
    average_correlation: Annotated[float, Field(ge=-1, le=1)] | None = None
    gradient_norm: NonNegative | None = None
    error_count: Count = 0
    is_ready_for_transition: bool = False

    saturation: NonNegative | None = None
    residual_gradient: Ratio | None = None
    residual_gradient_norm: NonNegative | None = None
    gradient_to_weight: NonNegative | None = None
    update_to_weight: NonNegative | None = None
    newborn_to_incumbent_gradient: NonNegative | None = None
    gradient_signal_to_noise: NonNegative | None = None


class SiteNode(Contract):
    """A growth site as a node of the layer graph. `widen_output` is the second layer of the pair
    of linear layers or convolutions that begins here, if one does: between the two stand one activation and what
    else keeps every unit to itself, as the contract's attribute `pair_between` tells."""

    contract: SiteContract
    parameter_count: Count
    flops_per_sample: Count
    depth: Count
    widen_output: SiteName | None = None
    seeds: tuple[Seed, ...]


class LayerEdge(Contract):
    """Data flows from one site to another; `elements` is the size of one sample of what flows."""

    source: SiteName
    target: SiteName
    elements: Count


class LayerGraph(Contract):
    """The sites of a model and the dataflow between them, found by autograd lineage."""

    nodes: tuple[SiteNode, ...]
    edges: tuple[LayerEdge, ...]


class HeadRef(Contract):
    """One committed checkpoint: the digest is that of its manifest."""

    digest: Digest
    parent: Digest | None
    step: Count
    epoch: Count
    """Epochs completed at this head."""


class Metrics(Contract):
    """Means over samples. `extra` holds what the task's own `metrics` returned on validation."""

    train_loss: float
    val_loss: float
    extra: dict[str, float] = Field(default_factory=dict)


class ScheduledAdaptation(Contract):
    """An adaptation as the trainer must know it before its kernel exists."""

    adaptation_id: AdaptationId
    number: Annotated[int, Field(ge=1)]
    site: SiteName
    seed: Count
    seed_generation: Count
    blueprint: str
    hyperparameters: Hyperparameters
    decided_epoch: Count
    apply_step: Count | None
    """`None` in asap mode: the first boundary after the kernel is ready."""


class KernelDelivery(Contract):
    """A certified kernel on its way to the trainer. `delivery_id` is a digest of what it is for, so that
    any number of deliveries is one."""

    delivery_id: Digest
    adaptation: ScheduledAdaptation
    kernel: Digest
    manifest: ArtifactRef
    weights: ArtifactRef
    certificate: ArtifactRef


class Fact(Contract):
    """A change of the model that is not a pure function of the checkpoint, recorded before it is made.

    Unique by (run, adaptation, kind); of strikes, there may be one at each step. `seq` orders the facts of one
    boundary. `delivery` travels with a graft and with a quarantine; `judge_step` is the step at which the graft is
    compared with its twin.
    """

    run_id: RunId
    adaptation_id: str
    kind: FactKind
    apply_step: Count
    seq: Count
    site: SiteName | None = None
    seed: Count | None = None
    delivery: KernelDelivery | None = None
    judge_step: Count | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        """What tells it from the other facts of its adaptation."""
        return f"{self.kind.value}@{self.apply_step}" if self.kind is FactKind.STRIKE else self.kind.value

    @property
    def decides(self) -> str:
        """What it settles: a graft and a missed delivery of one adaptation exclude each other."""
        return FactKind.GRAFT.value if self.kind is FactKind.MISSED else self.name

    def successor(self, kind: FactKind, apply_step: int, reason: str) -> "Fact":
        """Another fact of the same adaptation at the same seed."""
        return Fact(
            run_id=self.run_id,
            adaptation_id=self.adaptation_id,
            kind=kind,
            apply_step=apply_step,
            seq=0,
            site=self.site,
            seed=self.seed,
            reason=reason,
        )


class EpochReport(Contract):
    """What the trainer says of one finished epoch; committed in the transaction of its head."""

    run_id: RunId
    epoch: Annotated[int, Field(ge=1)]
    step: Count
    head: HeadRef
    metrics: Metrics
    learning_rate: NonNegative
    samples: Count
    parameters: Count
    training_flops: NonNegative
    probe_flops: NonNegative
    busy_seconds: NonNegative
    stall_seconds: NonNegative
    graph: LayerGraph
    health: tuple[HealthSignal, ...]
    site_samples: ArtifactRef | None = None
    """Layer inputs X and output gradients G of the probe batch; `None` when nothing can be ordered."""
    held_adaptation: AdaptationId | None = None
    """The graft that is on probation, if any."""
    facts: tuple[Fact, ...] = ()
    """The facts that were executed within this epoch, by `seq`."""
    stop: bool = False
    """True when early stopping ends the run with this epoch."""


class LossPoint(Contract):
    """The losses of one finished epoch: what a policy reads a slope from."""

    epoch: Annotated[int, Field(ge=1)]
    step: Count
    train_loss: float
    val_loss: float


class EpochResult(Contract):
    """The result of one `train_epoch` activity: a report when completed, else where it stands."""

    status: EpochStatus
    epoch: Annotated[int, Field(ge=1)]
    step: Count
    report: EpochReport | None = None


class Alternative(Contract):
    """One (site, blueprint) pair that a policy weighed."""

    site: SiteName
    blueprint: str
    hyperparameters: Hyperparameters = Field(default_factory=dict)
    score: float
    threshold: float
    added_parameters: Count
    added_flops_per_sample: Count
    eligible: bool
    reason: str


class AdaptationDecision(Contract):
    """One decision with everything that it was taken on, so that a replay explains it."""

    run_id: RunId
    epoch: Count
    policy: str
    kind: DecisionKind
    code: str
    """Stable word for why, such as `grow`, `hold`, `busy`, `budget`, `horizon`, `learning` or `requested`."""
    reason: str
    site: SiteName | None = None
    seed: Count | None = None
    blueprint: str | None = None
    hyperparameters: Hyperparameters = Field(default_factory=dict)
    contract: SiteContract | None = None
    """What the forge must know of the chosen site."""
    alternatives: tuple[Alternative, ...] = ()
    features: dict[str, float] = Field(default_factory=dict)
    thresholds: dict[str, float] = Field(default_factory=dict)


class JudgeReport(Contract):
    """The controlled experiment behind a verdict. Losses are means over the judge slice."""

    run_id: RunId
    adaptation_id: AdaptationId
    verdict: Verdict
    step: Count
    grown_loss: float | None = None
    twin_loss: float | None = None
    gain: float | None = None
    gain_lower_bound: float | None = None
    margin: float | None = None
    chunks: Count = 0
    twin_flops: NonNegative = 0.0
    reason: str


class Adaptation(Contract):
    """One adaptation as the run's record shows it."""

    adaptation_id: AdaptationId
    number: Annotated[int, Field(ge=1)]
    epoch: Count
    site: SiteName
    seed: Count
    seed_generation: Count
    blueprint: str
    hyperparameters: Hyperparameters = Field(default_factory=dict)
    kernel: Digest | None = None
    apply_step: Count | None = None
    judge_step: Count | None = None
    state: AdaptationState
    reason: str
    judge: JudgeReport | None = None


class Forgotten(Contract):
    """Adaptations that a run's workflow no longer keeps in mind, by number: Urza has them all."""

    ordered: Count = 0
    culled: Count = 0
    """Those of them that had been part of the model."""


class MessageTally(Contract):
    """What came to a run and changed nothing. Deliveries come at least once, and anybody may send a signal."""

    dead_letters: Count = 0
    """Could not be read: of no known name, of another version, or not what the name promises."""
    stale: Count = 0
    """Kernels for something that is over, that was ordered otherwise, or that nobody ordered."""
    repeated: Count = 0
    """Kernels that had come before."""
    recent: tuple[str, ...] = ()
    """The newest dead letters and stale kernels in words."""


class Compute(Contract):
    """Floating point operations: of training, and of probes and twins."""

    training_flops: NonNegative = 0.0
    probe_flops: NonNegative = 0.0
