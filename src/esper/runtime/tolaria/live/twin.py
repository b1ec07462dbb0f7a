"""The twin of a graft: the same run from the checkpoint before it, on the same batches, without it.

Its compute is counted. A cull adopts it, so that the run goes on bit for bit as one that never grafted.
"""

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass

from esper.contracts.enums import FactKind
from esper.contracts.operational import Fact
from esper.runtime.failpoints import hit
from esper.runtime.tolaria.checkpoint import Restored
from esper.runtime.tolaria.checkpoint import resume
from esper.runtime.tolaria.evaluation import JUDGE_LOOKS
from esper.runtime.tolaria.evaluation import chunk_losses
from esper.runtime.tolaria.live import surgery
from esper.runtime.tolaria.live.compilation import compile_grown
from esper.runtime.tolaria.live.epoch_end import measure_epoch
from esper.runtime.tolaria.live.epoch_end import watch_early_stop
from esper.runtime.tolaria.live.flops import FlopMeter
from esper.runtime.tolaria.live.run_state import RunState
from esper.runtime.tolaria.plan import TrainingPlan
from esper.runtime.tolaria.randomness import RandomState
from esper.runtime.tolaria.randomness import capture_random_state
from esper.runtime.tolaria.randomness import preserved_random_state
from esper.runtime.tolaria.randomness import restore_random_state
from esper.runtime.tolaria.trainee import Trainee
from esper.runtime.tolaria.trainee import begin


@dataclass(frozen=True)
class Twin:
    """`state` and `random` are the twin's own at the step it was trained to; `flops` is what it cost."""

    trainee: Trainee
    state: RunState
    random: RandomState
    flops: float
    looks: tuple[tuple[float, ...], ...]


def look_is_due(trainee: Trainee, judge_step: int | None) -> bool:
    """Whether the end of this epoch is one of the last before a verdict, or the verdict's own."""
    return judge_step is not None and 0 <= judge_step - trainee.step < JUDGE_LOOKS * trainee.plan.steps_per_epoch


def train_twin(
    plan: TrainingPlan, start: Restored, facts: Sequence[Fact], until: int, tick: Callable[[int], None]
) -> Twin:
    """Train from `start` to step `until` (the end of an epoch) on the calling thread.

    `facts` are those that were executed since and do not belong to the judged graft. `tick(step)` is called before
    each step and may raise to give up. The global generators are the caller's again afterwards.
    """
    with preserved_random_state():
        trainee = begin(plan, plan.another_model())
        state = resume(trainee, start)
        compile_grown(trainee, lambda: tick(trainee.step))
        restore_random_state(start.random)
        meter = FlopMeter()
        flops = 0.0
        looks: list[tuple[float, ...]] = []
        while trainee.step < until:
            tick(trainee.step)
            for fact in facts:
                if fact.apply_step == trainee.step and fact.kind is FactKind.REMOVE:
                    state = surgery.begin_removal(trainee, state, fact)
            surgery.follow_ramps(trainee, state)
            meter.count(trainee.advance())
            if any(trainee.step >= ramp.end_step for ramp in state.ramps):
                flops += meter.take(trainee)
                meter.structure_changed()
                state = surgery.end_ramps(trainee, state)
            if trainee.step % plan.steps_per_epoch == 0:
                flops += meter.take(trainee)
                if plan.config.training.early_stop is not None:
                    metrics = measure_epoch(trainee, lambda: tick(trainee.step))
                    state = watch_early_stop(trainee, state, metrics, held=False)
                    flops += len(plan.reported) * meter.cost(trainee).forward
                if look_is_due(trainee, until):
                    looks.append(tuple(chunk_losses(trainee.model, plan.validation, plan.judged, plan.loss)))
                    flops += plan.judge_rows * meter.cost(trainee).forward
                trainee.end_epoch()
                hit("judge.in_twin")
        return Twin(trainee, state, capture_random_state(), flops, tuple(looks))
