"""What a run must remember besides its tensors, as it lies in every checkpoint. Nothing in it is a time."""

from typing import Annotated

from pydantic import Field

from esper.contracts.assets import ArtifactRef
from esper.contracts.base import AdaptationId
from esper.contracts.base import Contract
from esper.contracts.base import SiteName
from esper.contracts.config import EarlyStopConfig
from esper.contracts.operational import Fact
from esper.contracts.operational import JudgeReport

Count = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0)]


class HeldGraft(Contract):
    """The graft on probation. `start` is the manifest of the checkpoint just before it: where its twin begins.

    `looks` are its losses by chunk of the judge slice at the last epoch ends before the verdict, and at the verdict.
    `strikes` are the steps in a row that its kernel failed, `all_strikes` those since the graft; at `struck_at` its
    kernel is not executed.
    """

    fact: Fact
    start: ArtifactRef | None = None
    looks: tuple[tuple[float, ...], ...] = ()
    strikes: Count = 0
    all_strikes: Count = 0
    struck_at: Count | None = None


class Ramp(Contract):
    """A block on its way out: alpha is `(end_step - step) / (end_step - start_step)` in between."""

    adaptation_id: AdaptationId
    site: SiteName
    seed: Count
    start_step: Count
    end_step: Count

    def alpha(self, step: int) -> float:
        if step >= self.end_step:
            return 0.0
        return (self.end_step - step) / (self.end_step - self.start_step)


class EarlyStop(Contract):
    """The best value of the watched metric so far, and the epochs at which it was reached and at which it ended all."""

    best: float | None = None
    best_epoch: Count = 0
    stopped_epoch: Annotated[int, Field(ge=1)] | None = None


class RunState(Contract):
    """The delivery ledger and the running totals of a run. FLOPs are those of the present epoch so far."""

    executed: tuple[Fact, ...] = ()
    """Every fact that was executed, in order: the delivery ledger."""
    reported: Count = 0
    """How many of them are in a report already."""
    held: HeldGraft | None = None
    ramps: tuple[Ramp, ...] = ()
    judgements: tuple[JudgeReport, ...] = ()
    early_stop: EarlyStop = EarlyStop()
    loss_sum: float = 0.0
    loss_rows: Count = 0
    training_flops: NonNegative = 0.0
    probe_flops: NonNegative = 0.0

    def has_executed(self, fact: Fact) -> bool:
        return any(done.adaptation_id == fact.adaptation_id and done.name == fact.name for done in self.executed)


def watch(state: EarlyStop, config: EarlyStopConfig, value: float, epoch: int, *, held: bool) -> EarlyStop:
    """Early stopping after `epoch` (from 1) with the metric at `value`.

    Ends when `patience` epochs in a row brought no new best. While a graft is on probation (`held`) nothing ends:
    its verdict comes first.
    """
    better = state.best is None or (value < state.best if config.mode == "min" else value > state.best)
    if better:
        return EarlyStop(best=value, best_epoch=epoch)
    if epoch - state.best_epoch >= config.patience and not held:
        return state.model_copy(update={"stopped_epoch": epoch})
    return state
