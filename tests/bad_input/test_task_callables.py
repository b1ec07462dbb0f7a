"""Row 16: what a task's own functions do wrong is said before a run begins."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from esper.errors import TargetError
from esper.runtime.tolaria.data.data_checks import check_task
from esper.runtime.tolaria.tasks import Task


def task() -> Task:
    x, y = torch.zeros(8, 2), torch.zeros(8, 1)
    return Task(
        model=nn.Linear(2, 1),
        train=TensorDataset(x, y),
        validation=TensorDataset(x, y),
        loss=lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
    )


def frozen() -> nn.Module:
    return nn.Linear(2, 1).requires_grad_(False)


CASES: list[tuple[dict[str, Callable[[], Any]], str, str]] = [
    ({"model": frozen}, "ESP-312", "no parameter to train"),
    ({"metrics": lambda: lambda model, batch: 1 / 0}, "ESP-313", "task.metrics raised"),
    ({"metrics": lambda: lambda model, batch: {"a": 1.0}}, "ESP-312", "dict of tensors"),
    ({"optimizer": lambda: lambda parameters: torch.optim.SGD(parameters, lr=-1)}, "ESP-313", "Invalid learning rate"),
    ({"optimizer": lambda: lambda parameters: "adam"}, "ESP-312", "not a torch.optim.Optimizer"),
]


@pytest.mark.parametrize(("changes", "code", "words"), CASES)
def test_row_16_callables_are_tried(changes: dict[str, Callable[[], Any]], code: str, words: str) -> None:
    with pytest.raises(TargetError, match=words) as refused:
        check_task(replace(task(), **{name: make() for name, make in changes.items()}), 4)
    assert refused.value.code == code


def test_a_sound_task_passes() -> None:
    check_task(task(), 4)
