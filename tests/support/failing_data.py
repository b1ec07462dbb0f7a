"""A task whose data can be told to fail: what `FAULT` raises for a row, at its n-th reading in the process."""

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import numpy
from tolaria_tasks import Small
from tolaria_tasks import small_data
from tolaria_tasks import small_loss
from torch.utils.data import Dataset

from esper.runtime.tolaria.tasks import Task


@dataclass
class Fault:
    """`split` raises `error()` from its `at`-th reading of a row on; `size_error()` when its size is asked for."""

    split: str = "none"
    error: Callable[[], BaseException] = ValueError
    at: int = 0
    size_error: Callable[[], BaseException] | None = None
    readings: dict[str, int] = field(default_factory=dict)


FAULT = Fault()


class Rows(Dataset[Any]):
    """The rows of another dataset, one by one."""

    def __init__(self, name: str, data: Dataset[Any]) -> None:
        self.name, self.data = name, data

    def __len__(self) -> int:
        if FAULT.split == self.name and FAULT.size_error is not None:
            raise FAULT.size_error()
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        FAULT.readings[self.name] = FAULT.readings.get(self.name, 0) + 1
        if FAULT.split == self.name and FAULT.size_error is None and FAULT.readings[self.name] >= FAULT.at:
            raise FAULT.error()
        return self.data[index]


def task() -> Task:
    train, validation = small_data(64)
    return Task(Small(), Rows("train", train), Rows("validation", validation), small_loss)


def failing_to_collate() -> Task:
    made = task()

    def collate(rows: list[Any]) -> Any:
        raise TypeError("first line\nrows of two kinds")

    made.collate = collate
    return made


def unseeded() -> Task:
    train, validation = small_data(64)
    train.tensors[0].add_(float(numpy.random.default_rng().random()))
    return Task(Small(), train, validation, small_loss)
