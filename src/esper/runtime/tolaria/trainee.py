"""One model under training: what a step is. The live model is one, and so is each twin."""

from contextlib import nullcontext
from dataclasses import dataclass
from dataclasses import field

import torch
from torch import Tensor
from torch import nn
from torch.optim import Optimizer

from esper.runtime.kasmina.telemetry import Telemetry
from esper.runtime.tolaria.loss_sum import LossSum
from esper.runtime.tolaria.plan import TrainingPlan
from esper.runtime.tolaria.recipe import clip_gradients
from esper.runtime.tolaria.sampler import epoch_permutation
from esper.runtime.tolaria.schedule import apply_schedule


class NotFinite(ArithmeticError):
    """The loss or a gradient of a step is no finite number."""


@dataclass
class Trainee:
    """`step` counts the steps taken, `completed` the epochs that were ended (evaluated and reported).

    `loss_sum` and `loss_rows` are over the rows of the present epoch so far.
    """

    plan: TrainingPlan
    model: nn.Module
    optimizer: Optimizer
    step: int = 0
    completed: int = 0
    loss_sum: LossSum = field(default_factory=LossSum)
    loss_rows: int = 0
    last_loss: Tensor | None = None
    _batches: tuple[int, tuple[Tensor, ...]] | None = None
    """The rows of each batch of one epoch."""

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def advance(self, telemetry: Telemetry | None = None, *, checked: bool = False) -> int:
        """Take one step, as the recipe says; returns the rows of its batch. With `checked`, which waits for the device,
        a loss or gradient that is not finite raises `NotFinite` before anything is changed by it."""
        plan = self.plan
        rows = self._rows()
        batch = plan.train.rows(rows)
        self.optimizer.zero_grad(set_to_none=True)
        ends_epoch = (self.step + 1) % plan.steps_per_epoch == 0
        with nullcontext() if telemetry is None else telemetry.step(self.step, last=ends_epoch):
            loss = plan.loss(self.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            if checked:
                _require_finite(loss, self.model)
        clip_gradients(self.model, plan.config.optimizer.clip)
        apply_schedule(self.optimizer, plan.schedule, self.step)
        self.optimizer.step()
        self.step += 1
        self.last_loss = loss.detach()
        count = len(rows)
        self.loss_sum.add(self.last_loss, count)
        self.loss_rows += count
        return count

    def rehearse(self) -> None:
        """Forward and backward of the next step, and no more than that. Raises what they raise, and `NotFinite`.
        Moves buffers and random generators as the step would, and leaves its gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.plan.loss(self.model, self.plan.train.rows(self._rows()))
        loss.backward()  # type: ignore[no-untyped-call]
        _require_finite(loss, self.model)

    def end_epoch(self) -> None:
        """The epoch is over: its losses are forgotten."""
        self.completed += 1
        self.loss_sum.zero_()
        self.loss_rows = 0

    def _rows(self) -> Tensor:
        epoch, position = divmod(self.step, self.plan.steps_per_epoch)
        if self._batches is None or self._batches[0] != epoch:
            order = epoch_permutation(len(self.plan.train), self.plan.config.run.seed, epoch)
            self._batches = epoch, torch.split(order, self.plan.config.training.batch_size)
        return self._batches[1][position]


def _require_finite(loss: Tensor, model: nn.Module) -> None:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    total = torch.nn.utils.get_total_norm(g.coalesce().values() if g.is_sparse else g for g in gradients)
    if not bool(torch.isfinite(loss.detach() + total.to(loss.device))):
        what = "loss" if not bool(torch.isfinite(loss.detach())) else "gradient"
        raise NotFinite(f"the {what} is not finite")


def begin(plan: TrainingPlan, model: nn.Module) -> Trainee:
    """A model before its first step, with a new optimizer."""
    return Trainee(plan, model, plan.optimizer(model))
