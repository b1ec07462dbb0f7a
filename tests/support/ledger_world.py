"""The fake world with a memory: reports, decisions and verdicts are recorded once; what comes second is compared."""

from dataclasses import dataclass
from dataclasses import field

from fake_activities import FakeWorld
from temporalio import activity

from esper.activities import names
from esper.contracts.operational import AdaptationDecision
from esper.contracts.operational import EpochResult
from esper.contracts.operational import JudgeReport
from esper.contracts.orders import EpochRequest
from esper.contracts.orders import InstallRequest
from esper.contracts.orders import InstallResult
from esper.contracts.orders import JudgeRequest
from esper.contracts.orders import RecordDecision


@dataclass
class LedgerWorld(FakeWorld):
    """What a session answers for an epoch that it is past, and what Urza answers for a decision that it has."""

    results: dict[int, EpochResult] = field(default_factory=dict)
    recorded: dict[int, AdaptationDecision] = field(default_factory=dict)
    verdicts: dict[str, JudgeReport] = field(default_factory=dict)
    divergences: int = 0

    @activity.defn(name=names.TRAIN_EPOCH.name)
    async def train_epoch(self, request: EpochRequest) -> EpochResult:
        if request.epoch in self.results and request.lease.lease_gen == self.lease_gen:
            return self.results[request.epoch]
        result = await super().train_epoch(request)
        if result.report is not None:
            self.results[request.epoch] = result
        return result

    @activity.defn(name=names.RECORD_DECISION.name)
    async def record_decision(self, request: RecordDecision) -> AdaptationDecision:
        epoch = request.decision.epoch
        first = self.recorded.setdefault(epoch, request.decision)
        self.divergences += first != request.decision
        self.decisions.append(first)
        return first

    @activity.defn(name=names.INSTALL_KERNEL.name)
    async def install_kernel(self, request: InstallRequest) -> InstallResult:
        known = self.grafts.get(request.delivery.adaptation.adaptation_id)
        if known is not None:
            return InstallResult(adaptation_id=known.adaptation_id, accepted=True, fact=known, reason="recorded before")
        return await super().install_kernel(request)

    @activity.defn(name=names.JUDGE_SEED.name)
    async def judge_seed(self, request: JudgeRequest) -> JudgeReport:
        if request.adaptation_id not in self.verdicts:
            self.verdicts[request.adaptation_id] = await super().judge_seed(request)
        return self.verdicts[request.adaptation_id]
