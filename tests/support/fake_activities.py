"""Activities of the real names and contracts with arithmetic in place of a model: for the workflow's logic alone."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from temporalio import activity
from temporalio.exceptions import ApplicationError

from esper.activities import names
from esper.contracts.assets import ArtifactRef
from esper.contracts.assets import Certificate
from esper.contracts.assets import Kernel
from esper.contracts.assets import Seed
from esper.contracts.assets import SiteContract
from esper.contracts.config import EsperConfig
from esper.contracts.enums import DecisionKind
from esper.contracts.enums import EpochStatus
from esper.contracts.enums import FactKind
from esper.contracts.enums import KernelState
from esper.contracts.enums import Outcome
from esper.contracts.enums import Verdict
from esper.contracts.operational import AdaptationDecision
from esper.contracts.operational import EpochReport
from esper.contracts.operational import EpochResult
from esper.contracts.operational import Fact
from esper.contracts.operational import HeadRef
from esper.contracts.operational import JudgeReport
from esper.contracts.operational import LayerGraph
from esper.contracts.operational import Metrics
from esper.contracts.operational import SiteNode
from esper.contracts.orders import AbandonRequest
from esper.contracts.orders import BuildRequest
from esper.contracts.orders import BuiltKernel
from esper.contracts.orders import CertifyRequest
from esper.contracts.orders import CheckpointRequest
from esper.contracts.orders import ClaimRequest
from esper.contracts.orders import DecisionRequest
from esper.contracts.orders import EpochRequest
from esper.contracts.orders import FinishedRun
from esper.contracts.orders import InstallRequest
from esper.contracts.orders import InstallResult
from esper.contracts.orders import JudgeRequest
from esper.contracts.orders import KnownRun
from esper.contracts.orders import Lease
from esper.contracts.orders import LoadedRun
from esper.contracts.orders import LoadRequest
from esper.contracts.orders import PublishRequest
from esper.contracts.orders import RecordAdaptation
from esper.contracts.orders import RecordDecision
from esper.contracts.orders import RecordOutcome
from esper.contracts.orders import RecordRun
from esper.contracts.orders import ReleaseRequest
from esper.contracts.orders import RemoveRequest
from esper.contracts.orders import RunRecord
from esper.runtime.temporal import queues

STEPS_PER_EPOCH = 10
HOLD_STEPS = 20
PINNED = f"{queues.TRAINER}@fake"
REF = ArtifactRef(digest="sha256:" + "ab" * 32, size_bytes=1)
SITE = SiteContract(
    site="layers.0", output_site="layers.0", kind="linear", input_shape=(4,), output_shape=(3,), dtype="float32"
)
GRAPH = LayerGraph(
    nodes=(
        SiteNode(
            contract=SITE,
            parameter_count=15,
            flops_per_sample=24,
            depth=0,
            seeds=(Seed(site="layers.0", index=0, generation=0),),
        ),
    ),
    edges=(),
)


def head(step: int) -> HeadRef:
    return HeadRef(digest=f"sha256:{step:064x}", parent=None, step=step, epoch=step // STEPS_PER_EPOCH)


@dataclass
class FakeWorld:
    """Every activity, and a journal of what was asked in which order."""

    grow_at: int | None = None
    verdict: Verdict = Verdict.KEEP
    forge_fails: bool = False
    score_fails: bool = False
    epoch_seconds: float = 0.0
    stop_at: int | None = None
    lose_at: int | None = None
    """Raise `LeaseLost` once, in this epoch."""
    load_error: ApplicationError | None = None
    journal: list[tuple[str, Any]] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    queue: str = PINNED
    """Of the trainer that is claimed next."""
    warnings: tuple[str, ...] = ()
    adaptations: list[Any] = field(default_factory=list)
    decisions: list[AdaptationDecision] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    requests: list[EpochRequest] = field(default_factory=list)
    epoch: int = 0
    lease_gen: int = 0
    holding: bool = False
    pauses: int = 0
    grafts: dict[str, Fact] = field(default_factory=dict)
    abandoned: dict[str, str] = field(default_factory=dict)
    executed: set[tuple[str, FactKind]] = field(default_factory=set)
    held: str | None = None
    turn: asyncio.Condition = field(default_factory=asyncio.Condition)
    config: EsperConfig | None = None

    def all(self) -> list[Callable[..., Any]]:
        return [value for name in dir(self) if hasattr(value := getattr(self, name), "__temporal_activity_definition")]

    @activity.defn(name=names.CLAIM_TRAINER.name)
    async def claim_trainer(self, request: ClaimRequest) -> Lease:
        self.lease_gen += 1
        self.journal.append(("claim", self.lease_gen))
        return Lease(run_id=request.run_id, task_queue=self.queue, lease_gen=self.lease_gen)

    @activity.defn(name=names.LOAD_RUN.name)
    async def load_run(self, request: LoadRequest) -> LoadedRun:
        if self.load_error is not None:
            raise self.load_error
        self.config = request.config
        self.holding = False
        return LoadedRun(
            step=self.epoch * STEPS_PER_EPOCH,
            epoch=self.epoch,
            steps_per_epoch=STEPS_PER_EPOCH,
            head=head(self.epoch * STEPS_PER_EPOCH),
            device="cpu",
            threads=1,
            parameters=100,
            model_name="Fake",
            graph=GRAPH,
            facts=tuple(self.facts),
        )

    @activity.defn(name=names.TRAIN_EPOCH.name)
    async def train_epoch(self, request: EpochRequest) -> EpochResult:
        self.requests.append(request)
        step = request.epoch * STEPS_PER_EPOCH
        async with self.turn:
            while self.epoch < request.epoch - 1 or self._judge_due():
                if self._held_back(request) or request.lease.lease_gen != self.lease_gen:
                    break
                await self._wait()
            if self._held_back(request):
                return EpochResult(status=EpochStatus.PAUSED, epoch=request.epoch, step=self.epoch * STEPS_PER_EPOCH)
            if request.lease.lease_gen != self.lease_gen:
                raise ApplicationError("fenced", type="LeaseLost", non_retryable=True)
            if self.stop_at is not None and request.epoch > self.stop_at:
                return EpochResult(status=EpochStatus.SKIPPED, epoch=request.epoch, step=step)
            if self.lose_at == request.epoch:
                self.lose_at = None
                raise ApplicationError("lost", type="LeaseLost", non_retryable=True)
            for expected in request.schedule:
                if expected.apply_step == step - STEPS_PER_EPOCH:
                    while expected.adaptation_id not in {*self.grafts, *self.abandoned}:
                        await self._wait()
            facts = self._facts_at(step - STEPS_PER_EPOCH)
            deadline = asyncio.get_running_loop().time() + self.epoch_seconds
            while (left := deadline - asyncio.get_running_loop().time()) > 0:
                await self._wait(left)
                if self._held_back(request):
                    return EpochResult(status=EpochStatus.PAUSED, epoch=request.epoch, step=step - STEPS_PER_EPOCH)
            self.epoch = request.epoch
            self.journal.append(("epoch", request.epoch))
            self.turn.notify_all()
        return EpochResult(
            status=EpochStatus.COMPLETED,
            epoch=request.epoch,
            step=step,
            report=self._report(request, facts),
        )

    def _held_back(self, request: EpochRequest) -> bool:
        return self.holding and request.pauses < self.pauses

    async def _wait(self, seconds: float = 0.05) -> None:
        activity.heartbeat("waiting")
        try:
            await asyncio.wait_for(self.turn.wait(), min(seconds, 0.05))
        except TimeoutError:
            return

    def _judge_due(self) -> bool:
        return any(
            key == self.held and fact.judge_step == self.epoch * STEPS_PER_EPOCH for key, fact in self.grafts.items()
        )

    def _facts_at(self, step: int) -> tuple[Fact, ...]:
        facts = []
        for key, fact in self.grafts.items():
            if fact.apply_step == step and (key, fact.kind) not in self.executed:
                self.executed.add((key, fact.kind))
                self.held = key
                facts.append(fact)
        return tuple(facts)

    def _report(self, request: EpochRequest, facts: tuple[Fact, ...]) -> EpochReport:
        step = request.epoch * STEPS_PER_EPOCH
        return EpochReport(
            run_id=request.lease.run_id,
            epoch=request.epoch,
            step=step,
            head=head(step),
            metrics=Metrics(train_loss=1 / request.epoch, val_loss=1.5 / request.epoch),
            learning_rate=0.1,
            samples=100,
            parameters=100 + 10 * len(self.executed),
            training_flops=1.0,
            probe_flops=0.0,
            busy_seconds=0.0,
            stall_seconds=0.0,
            graph=GRAPH,
            health=(),
            site_samples=REF,
            held_adaptation=self.held,
            facts=facts,
            stop=request.epoch == self.stop_at,
        )

    @activity.defn(name=names.INSTALL_KERNEL.name)
    async def install_kernel(self, request: InstallRequest) -> InstallResult:
        adaptation = request.delivery.adaptation
        self.journal.append(("install", adaptation.adaptation_id))
        apply_step = adaptation.apply_step
        if apply_step is None:
            apply_step = (self.epoch + 1) * STEPS_PER_EPOCH  # the epoch that runs now has read its facts already
        fact = Fact(
            run_id=request.lease.run_id,
            adaptation_id=adaptation.adaptation_id,
            kind=FactKind.GRAFT,
            apply_step=apply_step,
            seq=len(self.grafts) + 1,
            site=adaptation.site,
            seed=adaptation.seed,
            delivery=request.delivery,
            judge_step=apply_step + HOLD_STEPS,
        )
        if apply_step < self.epoch * STEPS_PER_EPOCH:
            missed = fact.model_copy(update={"kind": FactKind.MISSED})
            return InstallResult(adaptation_id=adaptation.adaptation_id, accepted=False, fact=missed, reason="too late")
        if adaptation.adaptation_id not in self.grafts:
            self.grafts[adaptation.adaptation_id] = fact
            self.facts.append(fact)
        fact = self.grafts[adaptation.adaptation_id]
        return InstallResult(adaptation_id=adaptation.adaptation_id, accepted=True, fact=fact, reason="graft recorded")

    @activity.defn(name=names.ABANDON_KERNEL.name)
    async def abandon_kernel(self, request: AbandonRequest) -> InstallResult:
        self.journal.append(("abandon", request.adaptation.adaptation_id))
        recorded = self.grafts.get(request.adaptation.adaptation_id)
        if recorded is not None:
            return InstallResult(
                adaptation_id=recorded.adaptation_id, accepted=True, fact=recorded, reason="a graft is recorded"
            )
        self.abandoned[request.adaptation.adaptation_id] = request.reason
        return InstallResult(adaptation_id=request.adaptation.adaptation_id, accepted=False, reason=request.reason)

    @activity.defn(name=names.JUDGE_SEED.name)
    async def judge_seed(self, request: JudgeRequest) -> JudgeReport:
        self.journal.append(("judge", request.adaptation_id))
        async with self.turn:
            if self.held is not None:
                graft = self.grafts[request.adaptation_id]
                kind = FactKind.FOSSILIZE if self.verdict is Verdict.KEEP else FactKind.CULL
                self.facts.append(graft.model_copy(update={"kind": kind, "apply_step": self.epoch * STEPS_PER_EPOCH}))
            self.held = None
            self.turn.notify_all()
        return JudgeReport(
            run_id=request.lease.run_id,
            adaptation_id=request.adaptation_id,
            verdict=self.verdict,
            step=self.epoch * STEPS_PER_EPOCH,
            reason=f"verdict {self.verdict.value}",
        )

    @activity.defn(name=names.REMOVE_SEED.name)
    async def remove_seed(self, request: RemoveRequest) -> InstallResult:
        self.journal.append(("remove", request.adaptation_id))
        return InstallResult(adaptation_id=request.adaptation_id, accepted=True, reason="ramping")

    @activity.defn(name=names.CHECKPOINT.name)
    async def checkpoint(self, request: CheckpointRequest) -> HeadRef:
        self.journal.append(("checkpoint", request.pauses))
        async with self.turn:
            self.holding, self.pauses = request.hold, request.pauses
            self.turn.notify_all()
        return head(self.epoch * STEPS_PER_EPOCH)

    @activity.defn(name=names.RELEASE_TRAINER.name)
    async def release_trainer(self, request: ReleaseRequest) -> FinishedRun:
        self.journal.append(("release", request.outcome))
        return FinishedRun(
            head=head(self.epoch * STEPS_PER_EPOCH), digest=REF.digest, metrics={"val_loss": 0.5}, parameters=100
        )

    @activity.defn(name=names.SCORE_SITES.name)
    async def score_sites(self, request: DecisionRequest) -> AdaptationDecision:
        epoch = request.score.report.epoch
        self.journal.append(("score", epoch))
        if self.score_fails:
            raise ApplicationError("no strategist", non_retryable=True)
        first = self.grow_at is not None and epoch >= self.grow_at and not request.score.adaptations
        grow = first or request.requested is not None
        return AdaptationDecision(
            run_id=request.score.run_id,
            epoch=epoch,
            policy="fake",
            kind=DecisionKind.GERMINATE if grow else DecisionKind.WAIT,
            code="grow" if grow else "hold" if request.score.report.held_adaptation else "learning",
            reason="because",
            site="layers.0" if grow else None,
            seed=0 if grow else None,
            blueprint="bottleneck" if grow else None,
            contract=SITE if grow else None,
        )

    @activity.defn(name=names.BUILD_KERNEL.name)
    async def build_kernel(self, request: BuildRequest) -> BuiltKernel:
        self.journal.append(("build", request.adaptation.adaptation_id))
        if self.forge_fails:
            raise ApplicationError("the forge is cold", type="BlueprintError", non_retryable=True)
        kernel = Kernel(
            digest=REF.digest,
            blueprint="bottleneck",
            hyperparameters={},
            site=SITE,
            manifest=REF,
            weights=REF,
            parameter_count=10,
        )
        return BuiltKernel(kernel=kernel)

    @activity.defn(name=names.CERTIFY_KERNEL.name)
    async def certify_kernel(self, request: CertifyRequest) -> PublishRequest:
        certificate = Certificate(
            kernel=request.kernel.digest,
            passed=True,
            birth_difference=0.0,
            first_step_drift=0.0,
            parameters_with_gradient=3,
            parameters_total=3,
            parameter_count=10,
            flops_per_sample=1,
            host_flops_per_sample=1,
            forward_us=1.0,
            host_forward_us=1.0,
            compiled="off",
            torch_version="0",
            forge="fake",
        )
        return PublishRequest(kernel=request.kernel, certificate=certificate, build=request.build)

    @activity.defn(name=names.PUBLISH_KERNEL.name)
    async def publish_kernel(self, request: PublishRequest) -> BuiltKernel:
        kernel = request.kernel.model_copy(update={"certificate": REF, "state": KernelState.CERTIFIED})
        return BuiltKernel(kernel=kernel)

    @activity.defn(name=names.RECORD_RUN.name)
    async def record_run(self, request: RecordRun) -> KnownRun:
        return KnownRun(record=self._record(request.run_id, request.config, Outcome.RUNNING))

    @activity.defn(name=names.RECORD_DECISION.name)
    async def record_decision(self, request: RecordDecision) -> AdaptationDecision:
        self.decisions.append(request.decision)
        return request.decision

    @activity.defn(name=names.RECORD_ADAPTATION.name)
    async def record_adaptation(self, request: RecordAdaptation) -> RecordAdaptation:
        self.adaptations.append(request.adaptation)
        return request

    @activity.defn(name=names.RECORD_OUTCOME.name)
    async def record_outcome(self, request: RecordOutcome) -> RunRecord:
        self.outcomes.append(request.outcome)
        self.warnings = request.warnings
        record = self._record(request.run_id, self.config, request.outcome)
        return record.model_copy(update={"failure": request.failure, "restarts": request.restarts})

    def _record(self, run_id: str, config: EsperConfig | None, outcome: Outcome) -> RunRecord:
        known = config or EsperConfig.model_validate({"task": {"name": "fake"}})
        return RunRecord(
            run_id=run_id,
            name="fake",
            config=known,
            outcome=outcome,
            created="2026-01-01T00:00:00+00:00",
            epochs=self.epoch,
            steps=self.epoch * STEPS_PER_EPOCH,
        )
