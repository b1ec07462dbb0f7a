"""Every optimizer step of a run on record, also those that a kill threw away: written by the task, read afterwards."""

import os
import struct
import time
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

STEP = struct.Struct("<dq")
"""Wall time (float64) and number (int64, from 1 along the run) of one step."""


def logged(optimizer: Optimizer, log: Path) -> Optimizer:
    """`optimizer`, one with a `step` in its state, which appends its steps to `log` / the pid of the process: a killed
    process has written all that it did."""
    file = os.open(log / str(os.getpid()), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(*_: Any) -> None:
        first = optimizer.param_groups[0]["params"][0]
        os.write(file, STEP.pack(time.time(), int(optimizer.state[first]["step"])))

    optimizer.register_step_post_hook(note)
    return optimizer


def steps_by_process(log: Path) -> list[list[tuple[float, int]]]:
    """Time and number of the steps that each process made, of those that made any."""
    made = []
    for path in log.iterdir():
        data = path.read_bytes()
        made.append(list(STEP.iter_unpack(data[: len(data) // STEP.size * STEP.size])))
    return [steps for steps in made if steps]
