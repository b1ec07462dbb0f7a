"""The task of a soak: the handwritten digits, with every optimizer step on record, also the ones a kill threw away."""

import os
import struct
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import esper
from esper.runtime.tolaria.data.quick_starts import digits

STEP = struct.Struct("<dq")
"""Wall time and number of one step."""


def task(log: str) -> esper.Task:
    """`log`: a folder, in which every process appends its steps to a file of its own."""
    parts = digits()

    def optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
        adamw = torch.optim.AdamW(parameters, lr=0.012, weight_decay=0.01)
        file = os.open(Path(log) / str(os.getpid()), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def note(*_: Any) -> None:
            first = adamw.param_groups[0]["params"][0]
            os.write(file, STEP.pack(time.time(), int(adamw.state[first]["step"])))

        adamw.register_step_post_hook(note)
        return adamw

    return esper.Task(
        model=parts.model(),
        train=parts.train,
        validation=parts.validation,
        loss=parts.loss,
        test=parts.test,
        metrics=parts.metrics,
        optimizer=optimizer,
    )
