"""The recipe of a run: what a plain PyTorch loop must do to end in the same bits.

1. `torch.set_num_threads(threads)`: `run.threads`, or for `auto` all cores but one.
2. `random.seed(s)`, `numpy.random.seed(s)`, `torch.manual_seed(s)` with `s = run.seed`; then the task is made (a
   packaged task draws its model from the global generators and nothing else); the model goes to the device; the
   optimizer is made from `model.parameters()`. No module's training flag is set: they stay as the task made them.
3. Epoch `e` (from 0) goes through the training rows in the order `torch.randperm(rows, generator=g)` with
   `g = torch.Generator().manual_seed((s + 1) * 1_000_003 + e)`, in batches of `training.batch_size`; the last,
   partial batch is kept. The rows of a `TensorDataset` are indexed, others are taken one by one and collated.
4. A step (`t` from 0): `optimizer.zero_grad(set_to_none=True)`; `loss(model, batch).backward()`;
   `clip_grad_norm_` over all parameters if `optimizer.clip` is set; the learning rate of every group is set to its
   own base rate times `Schedule.factor(t)` (`schedule.py`); `optimizer.step()`.
5. Evaluation (eval mode, no gradient), probes and twins leave generators, buffers and flags as they were.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from esper.contracts.config import OptimizerConfig
from esper.runtime.tezzeret.certifying.steps import configured


def build_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The configured optimizer, as the certificate of a kernel tries it: what is not configured is torch's default."""
    return configured(config, list(parameters))


def clip_gradients(model: nn.Module, largest_norm: float | None) -> None:
    """Scale all gradients so that their total norm is at most `largest_norm`; `None` leaves them."""
    if largest_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), largest_norm)
