"""Closed vocabularies. The values are what users read in JSON, in logs and in the Web UI."""

from collections.abc import Mapping
from enum import StrEnum


class SeedState(StrEnum):
    """Where a seed stands in its life; the legal moves are `runtime.kasmina.lifecycle.TRANSITIONS`."""

    DORMANT = "dormant"
    GERMINATED = "germinated"
    TRAINING = "training"
    GRAFTING = "grafting"
    FOSSILIZED = "fossilized"
    CULLED = "culled"
    ERROR_RECOVERY = "error_recovery"


class BlueprintState(StrEnum):
    """`DRAFT` until its IR has been validated once; `RETIRED` ones are never chosen again."""

    DRAFT = "draft"
    VALIDATED = "validated"
    INVALID = "invalid"
    RETIRED = "retired"


class KernelState(StrEnum):
    """`CERTIFIED` kernels may be grafted; `QUARANTINED` ones crashed a trainer and never are again."""

    BUILT = "built"
    CERTIFIED = "certified"
    REJECTED = "rejected"
    QUARANTINED = "quarantined"


class AdaptationState(StrEnum):
    """The life of one adaptation from its order to its single terminal outcome."""

    ORDERED = "ordered"
    DELIVERED = "delivered"
    TRAINING = "training"
    FOSSILIZED = "fossilized"
    CULLED = "culled"
    MISSED = "missed"
    FAILED = "failed"
    VETOED = "vetoed"
    STALE = "stale"


class Topic(StrEnum):
    """What an Oona message is about; each topic has exactly one payload model."""

    KERNEL_READY = "kernel.ready"
    KERNEL_FAILED = "kernel.failed"
    TRAINER_LOST = "trainer.lost"
    PAUSE = "run.pause"
    RESUME = "run.resume"
    STOP = "run.stop"
    REQUEST_ADAPTATION = "adaptation.request"
    VETO = "adaptation.veto"
    PIN_SITE = "site.pin"
    CULL_SEED = "seed.cull"


class Outcome(StrEnum):
    """How a run stands, as users see it."""

    RUNNING = "running"
    PAUSED = "paused"
    COMPLETED = "completed"
    STOPPED = "stopped"
    FAILED = "failed"


class DeliveryMode(StrEnum):
    """`SCHEDULED` grafts at a step fixed by the decision; `ASAP` at the first boundary after readiness."""

    SCHEDULED = "scheduled"
    ASAP = "asap"


class FactKind(StrEnum):
    """What kind of change of the live model a fact records."""

    GRAFT = "graft"
    MISSED = "missed"
    FOSSILIZE = "fossilize"
    CULL = "cull"
    REMOVE = "remove"
    STRIKE = "strike"
    """The kernel on probation failed a step, which was taken without it."""
    BREAKER = "breaker"
    """The kernel on probation failed too often, or took too much: removed at once."""
    QUARANTINE = "quarantine"
    """The kernel ended its process twice: it is never executed again, and its graft is not made."""
    STOP = "stop"


class DecisionKind(StrEnum):
    """What a decision orders."""

    WAIT = "wait"
    GERMINATE = "germinate"


STATE_AFTER: Mapping[FactKind, AdaptationState] = {
    FactKind.GRAFT: AdaptationState.TRAINING,
    FactKind.MISSED: AdaptationState.MISSED,
    FactKind.FOSSILIZE: AdaptationState.FOSSILIZED,
    FactKind.CULL: AdaptationState.CULLED,
    FactKind.REMOVE: AdaptationState.CULLED,
    FactKind.BREAKER: AdaptationState.CULLED,
    FactKind.QUARANTINE: AdaptationState.FAILED,
}
"""What becomes of an adaptation by a fact about it."""


class EpochStatus(StrEnum):
    """How one `train_epoch` activity ended."""

    COMPLETED = "completed"
    PAUSED = "paused"
    SKIPPED = "skipped"


class Verdict(StrEnum):
    """What the judge found; `VOID` when there was nothing left to judge."""

    KEEP = "keep"
    CULL = "cull"
    VOID = "void"
