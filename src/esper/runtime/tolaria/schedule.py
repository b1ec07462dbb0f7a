"""The learning rate as a pure function of the step, so that neither a restart nor a graft can shift it."""

import math
from dataclasses import dataclass

from torch.optim import Optimizer

from esper.contracts.config import ScheduleConfig

BASE_LR = "initial_lr"
"""Key of a parameter group's own learning rate, which the schedule's factor scales; torch's schedulers use the same."""


@dataclass(frozen=True)
class Schedule:
    """The factor on the base learning rate at each of `total_steps` steps.

    With `w = round(warmup * total_steps)` and, for a step `s` counted from 0, `p = (s - w) / (total_steps - w)`:

    - `s < w`: `(s + 1) / w`;
    - `constant`: `1`; `linear`: `1 - p`; `cosine`: `(1 + cos(pi p)) / 2`
      (Loshchilov and Hutter, SGDR, equation 5, one period).
    """

    config: ScheduleConfig
    total_steps: int

    @property
    def warmup_steps(self) -> int:
        return round(self.config.warmup * self.total_steps)

    def factor(self, step: int) -> float:
        warmup = self.warmup_steps
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, self.total_steps - warmup))
        match self.config.name:
            case "constant":
                return 1.0
            case "linear":
                return 1.0 - progress
            case "cosine":
                return 0.5 * (1.0 + math.cos(math.pi * progress))


def remember_base_rates(optimizer: Optimizer) -> None:
    """Keep each group's own learning rate under `initial_lr`, where it is not known yet."""
    for group in optimizer.param_groups:
        group.setdefault(BASE_LR, float(group["lr"]))


def apply_schedule(optimizer: Optimizer, schedule: Schedule, step: int) -> None:
    """Set the learning rate of every group for `step`: its own base rate times the factor."""
    factor = schedule.factor(step)
    for group in optimizer.param_groups:
        group["lr"] = group[BASE_LR] * factor
