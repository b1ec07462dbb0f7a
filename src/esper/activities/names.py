"""The activities as workflows see them: name, argument and result type.

Workflows call `workflow.execute_activity(TRAIN_EPOCH.name, request, result_type=TRAIN_EPOCH.result, ...)`,
so that the orchestrator never imports what an activity is made of.
"""

from dataclasses import dataclass
from typing import Generic
from typing import TypeVar

from esper.contracts import orders
from esper.contracts.operational import AdaptationDecision
from esper.contracts.operational import EpochResult
from esper.contracts.operational import HeadRef
from esper.contracts.operational import JudgeReport

ArgumentT = TypeVar("ArgumentT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class ActivityName(Generic[ArgumentT, ResultT]):
    """One activity: what it is called, what it takes, what it gives."""

    name: str
    argument: type[ArgumentT]
    result: type[ResultT]


CLAIM_TRAINER = ActivityName("claim_trainer", orders.ClaimRequest, orders.Lease)
LOAD_RUN = ActivityName("load_run", orders.LoadRequest, orders.LoadedRun)
TRAIN_EPOCH = ActivityName("train_epoch", orders.EpochRequest, EpochResult)
INSTALL_KERNEL = ActivityName("install_kernel", orders.InstallRequest, orders.InstallResult)
ABANDON_KERNEL = ActivityName("abandon_kernel", orders.AbandonRequest, orders.InstallResult)
JUDGE_SEED = ActivityName("judge_seed", orders.JudgeRequest, JudgeReport)
REMOVE_SEED = ActivityName("remove_seed", orders.RemoveRequest, orders.InstallResult)
CHECKPOINT = ActivityName("checkpoint", orders.CheckpointRequest, HeadRef)
RELEASE_TRAINER = ActivityName("release_trainer", orders.ReleaseRequest, orders.FinishedRun)

SCORE_SITES = ActivityName("score_sites", orders.DecisionRequest, AdaptationDecision)

BUILD_KERNEL = ActivityName("build_kernel", orders.BuildRequest, orders.BuiltKernel)
CERTIFY_KERNEL = ActivityName("certify_kernel", orders.CertifyRequest, orders.PublishRequest)
PUBLISH_KERNEL = ActivityName("publish_kernel", orders.PublishRequest, orders.BuiltKernel)

RECORD_RUN = ActivityName("record_run", orders.RecordRun, orders.KnownRun)
RECORD_DECISION = ActivityName("record_decision", orders.RecordDecision, AdaptationDecision)
RECORD_ADAPTATION = ActivityName("record_adaptation", orders.RecordAdaptation, orders.RecordAdaptation)
RECORD_OUTCOME = ActivityName("record_outcome", orders.RecordOutcome, orders.RunRecord)
