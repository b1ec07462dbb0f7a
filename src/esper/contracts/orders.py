"""What workflows ask of activities and of each other, and what they get back."""

from typing import Annotated

from pydantic import Field
from pydantic import JsonValue

from esper.contracts.assets import ArtifactRef
from esper.contracts.assets import Certificate
from esper.contracts.assets import Kernel
from esper.contracts.assets import SiteContract
from esper.contracts.base import AdaptationId
from esper.contracts.base import Contract
from esper.contracts.base import Digest
from esper.contracts.base import RunId
from esper.contracts.base import SiteName
from esper.contracts.config import EsperConfig
from esper.contracts.config import OptimizerConfig
from esper.contracts.config import TamiyoConfig
from esper.contracts.config import TezzeretConfig
from esper.contracts.config import UrzaConfig
from esper.contracts.enums import DecisionKind
from esper.contracts.enums import Outcome
from esper.contracts.messages import RequestAdaptation
from esper.contracts.operational import Adaptation
from esper.contracts.operational import AdaptationDecision
from esper.contracts.operational import Compute
from esper.contracts.operational import EpochReport
from esper.contracts.operational import Fact
from esper.contracts.operational import Forgotten
from esper.contracts.operational import HeadRef
from esper.contracts.operational import KernelDelivery
from esper.contracts.operational import LayerGraph
from esper.contracts.operational import LossPoint
from esper.contracts.operational import MessageTally
from esper.contracts.operational import ScheduledAdaptation


class CodeLocation(Contract):
    """Where a local run finds the user's own code: put on `sys.path` by the trainer that serves it."""

    directory: str
    python_path: tuple[str, ...] = ()


class Lease(Contract):
    """The right to train one run: the queue of the process that holds it, and the fencing token."""

    run_id: RunId
    task_queue: str
    lease_gen: Annotated[int, Field(ge=1)]


class ClaimRequest(Contract):
    run_id: RunId
    urza: UrzaConfig
    preferred_queue: str | None = None
    known_lease_gen: Annotated[int, Field(ge=0)] = 0
    """The highest lease that the run's workflow was ever given: a database that is below it was restored from an
    older copy."""
    recovers: bool = False
    """A person knows of that, and goes on from what the database has."""


class LoadRequest(Contract):
    lease: Lease
    config: EsperConfig
    code: CodeLocation | None = None
    accept_drift: bool = False
    """Go on with another recipe, model or data set than those of the head; it is recorded."""


class LoadedRun(Contract):
    """What the trainer says once the model stands: where it is and what it is made of."""

    step: Annotated[int, Field(ge=0)]
    epoch: Annotated[int, Field(ge=0)]
    """Epochs completed."""
    steps_per_epoch: Annotated[int, Field(ge=1)]
    head: HeadRef
    device: str
    threads: Annotated[int, Field(ge=1)]
    parameters: Annotated[int, Field(ge=0)]
    model_name: str
    graph: LayerGraph
    facts: tuple[Fact, ...] = ()
    """The facts about the run's newest adaptations, by `seq`: what a new owner of the run must know."""
    finished: bool = False
    """True when the head is already the final one (early stop or last epoch)."""
    warnings: tuple[str, ...] = ()
    rewound_from: tuple[Digest, ...] = ()
    """Damaged heads in whose place the run goes on from `head`."""


class EpochRequest(Contract):
    """Train to the end of epoch `epoch` (1-based). `schedule` holds every adaptation that may apply in it."""

    lease: Lease
    epoch: Annotated[int, Field(ge=1)]
    schedule: tuple[ScheduledAdaptation, ...] = ()
    expects_decision: bool = False
    """True when a decision will follow on the report, so that the probe is worth its cost."""
    pauses: Annotated[int, Field(ge=0)] = 0
    """How often the run has been paused so far: an order from before a pause does not undo it."""


class InstallRequest(Contract):
    lease: Lease
    delivery: KernelDelivery


class AbandonRequest(Contract):
    """No kernel will be grafted for this adaptation: its forge failed, or a person vetoed it."""

    lease: Lease
    adaptation: ScheduledAdaptation
    reason: str


class InstallResult(Contract):
    """The fact that now rules the delivery: a graft at its step, or why there will be none."""

    adaptation_id: AdaptationId
    accepted: bool
    fact: Fact | None = None
    reason: str


class JudgeRequest(Contract):
    lease: Lease
    adaptation_id: AdaptationId


class RemoveRequest(Contract):
    """A person's cull: ramp to zero, then remove."""

    lease: Lease
    adaptation_id: AdaptationId
    site: SiteName


class CheckpointRequest(Contract):
    """Commit at the next step boundary; with `hold` training stays there until the next `train_epoch`."""

    lease: Lease
    hold: bool
    pauses: Annotated[int, Field(ge=0)] = 0


class ReleaseRequest(Contract):
    lease: Lease
    finish: bool
    """True at the end of a run: evaluate on `test`, export the plain model, store the output files."""
    outcome: Outcome


class FinishedRun(Contract):
    """What only the trainer knows at the end."""

    head: HeadRef | None
    """`None` when it let go of a run that it had not loaded."""
    digest: Digest | None
    metrics: dict[str, float]
    parameters: Annotated[int, Field(ge=0)]
    data_digest: str | None = None
    """Which data it was trained on, where the task can say."""
    files: dict[str, ArtifactRef] = Field(default_factory=dict)
    """Output file name to its bytes in Urza."""


class ScoreRequest(Contract):
    """Everything a policy may read. No clock, no timing, no random number."""

    run_id: RunId
    tamiyo: TamiyoConfig
    max_epochs: Annotated[int, Field(ge=1)]
    steps_per_epoch: Annotated[int, Field(ge=1)]
    lag_epochs: Annotated[int, Field(ge=1)]
    hold_window_steps: Annotated[int, Field(ge=0)]
    report: EpochReport
    history: tuple[LossPoint, ...] = ()
    """The losses of earlier epochs, oldest first."""
    adaptations: tuple[Adaptation, ...] = ()
    """Those that the run's workflow keeps in mind; the older ones are counted in `forgotten`."""
    forgotten: Forgotten = Forgotten()
    pinned: tuple[SiteName, ...] = ()
    in_flight: AdaptationId | None = None


class DecisionRequest(Contract):
    """Input of a `TamiyoDecision` child. A person's request takes the place of the policy's choice."""

    score: ScoreRequest
    urza: UrzaConfig
    requested: RequestAdaptation | None = None


class BuildRequest(Contract):
    """Input of a `TezzeretCompile` child and of its `build_kernel`."""

    run_id: RunId
    run_seed: Annotated[int, Field(ge=0)]
    adaptation: ScheduledAdaptation
    site: SiteContract
    site_samples: ArtifactRef | None
    tezzeret: TezzeretConfig
    optimizer: OptimizerConfig
    """The run's own: the certificate measures the drift of one of its steps."""
    urza: UrzaConfig


class BuiltKernel(Contract):
    kernel: Kernel


class CertifyRequest(Contract):
    kernel: Kernel
    build: BuildRequest


class PublishRequest(Contract):
    kernel: Kernel
    certificate: Certificate
    build: BuildRequest


class Lineage(Contract):
    """Where a run branched off another: after which epoch, at which head, and what was decided there by hand."""

    parent: RunId
    epoch: Annotated[int, Field(ge=1)]
    head: Digest
    decision: DecisionKind | None = None
    """`None`: the branch's own policy decides on that epoch again."""


class RunRecord(Contract):
    """A run as Urza knows it."""

    run_id: RunId
    name: str
    config: EsperConfig
    outcome: Outcome
    created: str
    """ISO 8601, UTC; informative, never ordered by."""
    epochs: Annotated[int, Field(ge=0)] = 0
    steps: Annotated[int, Field(ge=0)] = 0
    lease_gen: Annotated[int, Field(ge=0)] = 0
    head: HeadRef | None = None
    device: str | None = None
    threads: int | None = None
    parameters_start: Annotated[int, Field(ge=0)] | None = None
    finished: FinishedRun | None = None
    restarts: Annotated[int, Field(ge=0)] = 0
    divergences: Annotated[int, Field(ge=0)] = 0
    warnings: tuple[str, ...] = ()
    failure: dict[str, JsonValue] | None = None
    """The error form of a failed run: code, message, hint."""
    lineage: Lineage | None = None


class RecordRun(Contract):
    """Insert the run, or find it as it is."""

    run_id: RunId
    config: EsperConfig
    replaces: bool = False
    """A run that is there takes this configuration over; else one with another is a conflict."""


class OpenOrder(Contract):
    """A kernel that was ordered and neither grafted nor missed when the run ended: what its forge must know."""

    adaptation_id: AdaptationId
    site: SiteContract
    site_samples: ArtifactRef | None = None


class KnownRun(Contract):
    """What Urza already knows when a workflow begins: empty for a new run, the past of a resumed one."""

    record: RunRecord
    adaptations: tuple[Adaptation, ...] = ()
    forgotten: Forgotten = Forgotten()
    losses: tuple[LossPoint, ...] = ()
    report: EpochReport | None = None
    """The last one, when there is one."""
    decided_epoch: Annotated[int, Field(ge=0)] = 0
    decisions: Annotated[int, Field(ge=0)] = 0
    open_orders: tuple[OpenOrder, ...] = ()


class RecordDecision(Contract):
    urza: UrzaConfig
    decision: AdaptationDecision


class RecordAdaptation(Contract):
    """Insert or advance one adaptation. The first terminal state wins."""

    run_id: RunId
    urza: UrzaConfig
    adaptation: Adaptation


class RecordOutcome(Contract):
    run_id: RunId
    urza: UrzaConfig
    outcome: Outcome
    loaded: LoadedRun | None = None
    finished: FinishedRun | None = None
    restarts: Annotated[int, Field(ge=0)] = 0
    warnings: tuple[str, ...] = ()
    failure: dict[str, JsonValue] | None = None


class RunDocument(Contract):
    """`start-run --json` and `show --json`: the public face of a run."""

    schema_version: Annotated[int, Field(alias="schema")] = 1
    run_id: RunId
    workflow_id: str
    outcome: Outcome
    epochs: int
    steps: int
    device: str | None
    threads: int | None
    restarts: int
    metrics: dict[str, float | int | None]
    parameters: dict[str, int | None]
    compute: Compute
    adaptations: tuple[dict[str, JsonValue], ...]
    decisions: int
    missed: int
    stall_s: float
    divergences: int
    digest: Digest | None
    data_digest: str | None = None
    """Of the data, where the task can say: the source that `charlm` reads is another with another Python."""
    web_ui: str | None
    output: str | None
    warnings: tuple[str, ...] = ()
    error: dict[str, JsonValue] | None = None
    """Of a failed run, in the error form of `--json`."""
    lineage: Lineage | None = None


class RunStatus(Contract):
    """The answer of the `status` query: where a run stands, from its workflow alone."""

    run_id: RunId
    phase: str
    outcome: Outcome
    epoch: Annotated[int, Field(ge=0)]
    max_epochs: Annotated[int, Field(ge=1)]
    step: Annotated[int, Field(ge=0)]
    train_loss: float | None
    val_loss: float | None
    best_val_loss: float | None
    parameters: int | None
    live_kernels: Annotated[int, Field(ge=0)]
    decisions: Annotated[int, Field(ge=0)]
    restarts: Annotated[int, Field(ge=0)]
    task_queue: str | None
    lease_gen: Annotated[int, Field(ge=0)]
    pinned: tuple[SiteName, ...]
    messages: MessageTally = MessageTally()


class TrainingState(Contract):
    """What a `TrainingRun` carries over continue-as-new."""

    lease: Lease | None = None
    lease_gen: Annotated[int, Field(ge=0)] = 0
    """The highest that the run was ever given."""
    loaded: LoadedRun | None = None
    completed_epoch: Annotated[int, Field(ge=0)] = 0
    adaptations: tuple[Adaptation, ...] = ()
    forgotten: Forgotten = Forgotten()
    messages: MessageTally = MessageTally()
    deliveries: tuple[KernelDelivery, ...] = ()
    report: EpochReport | None = None
    """The last report: what the next decision is taken on."""
    losses: tuple[LossPoint, ...] = ()
    pinned: tuple[SiteName, ...] = ()
    requested: RequestAdaptation | None = None
    stopping: bool = False
    paused: bool = False
    pauses: Annotated[int, Field(ge=0)] = 0
    restarts: Annotated[int, Field(ge=0)] = 0
    decisions: Annotated[int, Field(ge=0)] = 0
    losses_in_a_row: Annotated[int, Field(ge=0)] = 0


class TrainingRequest(Contract):
    """Input of a `TrainingRun`."""

    run_id: RunId
    config: EsperConfig
    code: CodeLocation | None = None
    accept_drift: bool = False
    """Go on also with another configuration, model or data set than those of the head; it is recorded."""
    replaces_config: bool = False
    """`config` is another than the recorded one, whose place it takes (`resume --set`)."""
    recovers_above: Annotated[int, Field(ge=0)] = 0
    """Set by `recover` where the database was restored from an older copy: the highest lease of the lost time."""
    expected_head: Digest | None = None
    """Set by `resume` of an ended run: the head that it must go on from."""
    requested: RequestAdaptation | None = None
    """What the first decision of this execution is to order (a branch with a decision by hand)."""
    search_attributes: bool = True
    """False where the namespace lacks them: the run goes on without."""
    continue_after_epochs: Annotated[int, Field(ge=1)] | None = None
    """Continue-as-new after so many epochs even when the server does not suggest it (tests)."""
    state: TrainingState | None = None
