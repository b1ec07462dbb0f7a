"""The task of a soak: the handwritten digits, with every optimizer step on record, also the ones a kill threw away."""

from collections.abc import Iterable
from pathlib import Path

import torch
from benchmarks.engine.step_log import logged
from torch import nn
from torch.optim import Optimizer

import esper
from esper.runtime.tolaria.data.quick_starts import digits


def task(log: str) -> esper.Task:
    """`log`: the folder of the `step_log`."""
    parts = digits()

    def optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
        return logged(torch.optim.AdamW(parameters, lr=0.012, weight_decay=0.01), Path(log))

    return esper.Task(
        model=parts.model(),
        train=parts.train,
        validation=parts.validation,
        loss=parts.loss,
        test=parts.test,
        metrics=parts.metrics,
        optimizer=optimizer,
    )
