"""What a row costs: floating point operations counted by torch itself, once for each structure of the model."""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from esper.runtime.kasmina.lifecycle import LIVE
from esper.runtime.kasmina.wrapping.undisturbed import undisturbed
from esper.runtime.tolaria.live.surgery import all_seeds
from esper.runtime.tolaria.live.surgery import asleep
from esper.runtime.tolaria.live.surgery import eager_kernels
from esper.runtime.tolaria.trainee import Trainee


@dataclass(frozen=True)
class RowCost:
    """Floating point operations of one row: in a forward, and in a forward and backward. Optimizers are not counted."""

    forward: float
    training: float


def measure(trainee: Trainee) -> RowCost:
    """Count one batch of the training data; the model, its gradients and the generators are left as they were. Where a
    kernel on probation fails, its share is left out."""
    try:
        return _counted(trainee)
    except Exception:
        on_probation = [seed for seed in all_seeds(trainee.model) if seed.state in LIVE]
        if not on_probation:
            raise
    with ExitStack() as stack:
        for seed in on_probation:
            stack.enter_context(asleep(trainee.model, seed.site, seed.index))
        return _counted(trainee)


def _counted(trainee: Trainee) -> RowCost:
    plan = trainee.plan
    rows = plan.probed[: plan.config.training.batch_size]
    batch = plan.train.peek(rows)
    forward, both = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with undisturbed(trainee.model), eager_kernels(trainee.model):
        with forward, torch.no_grad():
            plan.loss(trainee.model, batch)
        with both, torch.enable_grad():
            plan.loss(trainee.model, batch).backward()  # type: ignore[no-untyped-call]
    return RowCost(forward.get_total_flops() / len(rows), both.get_total_flops() / len(rows))


class FlopMeter:
    """Counts the rows that the present structure was trained on, and what they cost."""

    def __init__(self) -> None:
        self._cost: RowCost | None = None
        self._rows = 0

    def cost(self, trainee: Trainee) -> RowCost:
        """What a row costs in the present structure."""
        if self._cost is None:
            self._cost = measure(trainee)
        return self._cost

    def count(self, rows: int) -> None:
        self._rows += rows

    def take(self, trainee: Trainee) -> float:
        """The operations of all rows counted since the last call."""
        rows, self._rows = self._rows, 0
        return rows * self.cost(trainee).training if rows else 0.0

    def structure_changed(self) -> None:
        """To be called after a graft or a removal; `take` before it."""
        self._cost = None
