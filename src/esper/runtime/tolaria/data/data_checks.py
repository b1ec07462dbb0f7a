"""Data that cannot be trained on is named before a run begins, by its first offending row."""

import math
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset
from torch.utils.data import TensorDataset

from esper.errors import DatasetError
from esper.errors import TargetError
from esper.errors import last_line
from esper.runtime.kasmina.wrapping.undisturbed import undisturbed
from esper.runtime.tolaria.sampler import Batches
from esper.runtime.tolaria.tasks import Task

SAMPLED_ROWS = 1024
"""How many rows of a dataset that is not a `TensorDataset` are looked at, evenly spread and with the last."""

LARGEST_LABEL_SET = 4096
"""More distinct values than this in an integer tensor are taken for something else than class labels."""

IGNORED_LABEL = -100
"""What `torch.nn.functional.cross_entropy` leaves out by default."""

_YOUR_DATA = "It is the task's own data that raised; read it by itself"


def check_task(task: Task, batch_size: int) -> None:
    """Look at the data, and run one batch forward and backward, on the CPU and before any side effect.

    The model's weights, buffers and the global generators are left as they were. Raises `DatasetError`: ESP-340
    empty, ESP-341 too few rows, ESP-342 label out of range, ESP-343 NaN or infinity, ESP-344 batch larger than the
    data, ESP-345 rows of different shape; `TargetError` (ESP-312, 313) when the loss or a row cannot be had.
    """
    splits = {"train": task.train, "validation": task.validation} | ({} if task.test is None else {"test": task.test})
    for name, dataset in splits.items():
        _check_size(name, dataset)
    rows = len(task.train)  # type: ignore[arg-type]
    if batch_size > rows:
        raise DatasetError(
            "ESP-344",
            f"training.batch_size is {batch_size}, but train has {rows} rows",
            hint=f"Give at most {rows}",
        )
    for name, dataset in splits.items():
        _check_rows(name, dataset)
    if not any(parameter.requires_grad for parameter in task.model.parameters()):
        raise TargetError("ESP-312", "task.model has no parameter to train", hint="Give it one with requires_grad=True")
    with undisturbed(task.model):
        for name, dataset in splits.items():
            _check_labels(name, dataset, task)
        _check_loss(task, batch_size)
        _check_metrics(task, batch_size)
    _check_optimizer(task)


def _check_size(name: str, dataset: Dataset[Any]) -> None:
    with _explained(f"the size of {name} raised", _YOUR_DATA):
        rows = len(dataset)  # type: ignore[arg-type]
    if rows == 0:
        raise DatasetError("ESP-340", f"{name} is empty", hint="Give a dataset with rows")
    if rows == 1 and name != "test":
        why = "a part of it is shown and the rest judges" if name == "validation" else "there is nothing to learn from"
        raise DatasetError("ESP-341", f"{name} has a single row: {why}", hint="Give at least 2 rows")


def _check_rows(name: str, dataset: Dataset[Any]) -> None:
    if type(dataset) is TensorDataset:
        for position, tensor in enumerate(dataset.tensors):
            _check_finite(name, _first_bad_row(tensor), f"item {position}")
        return
    first: tuple[Any, ...] | None = None
    for index in _spread(len(dataset)):  # type: ignore[arg-type]
        row = _row(name, dataset, index)
        tensors = list(_tensors(row))
        for position, tensor in enumerate(tensors):
            if _first_bad_row(tensor.reshape(1, -1)) is not None:
                _check_finite(name, index, f"item {position}")
        shape = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
        if first is None:
            first = shape
        elif shape != first:
            raise DatasetError(
                "ESP-345",
                f"{name} row {index} has shapes {_shapes(shape)}, row 0 has {_shapes(first)}",
                hint="Give all rows one shape, or a collate function of the task that makes one batch of them",
            )


def _check_finite(name: str, index: int | None, where: str) -> None:
    if index is not None:
        raise DatasetError("ESP-343", f"{name} row {index}: {where} holds NaN or infinity", hint="Clean the data")


def _first_bad_row(tensor: Tensor) -> int | None:
    if not tensor.is_floating_point() or bool(tensor.isfinite().all()):
        return None
    bad = ~tensor.reshape(len(tensor), -1).isfinite().all(dim=1)
    return int(bad.nonzero()[0])


def _check_labels(name: str, dataset: Dataset[Any], task: Task) -> None:
    """Run the loss on one row of each label: an index outside the model's classes raises there."""
    if type(dataset) is not TensorDataset or task.collate is not None:
        return
    for tensor in dataset.tensors:
        if tensor.dtype is not torch.int64 or tensor.dim() != 1:
            continue
        values, places = _first_of_each(tensor)
        if len(values) > LARGEST_LABEL_SET:
            continue
        negative = [place for value, place in zip(values, places, strict=True) if value < 0 and value != IGNORED_LABEL]
        if negative:
            place = min(negative)
            raise DatasetError("ESP-342", f"{name} row {place}: label {int(tensor[place])} is negative")
        _try_labels(name, dataset, task, tensor, sorted(places))


def _first_of_each(labels: Tensor) -> tuple[list[int], list[int]]:
    values, inverse = torch.unique(labels, return_inverse=True)
    places = torch.full((len(values),), len(labels), dtype=torch.int64)
    places.scatter_reduce_(0, inverse, torch.arange(len(labels)), reduce="amin")
    return values.tolist(), places.tolist()


def _try_labels(name: str, dataset: Dataset[Any], task: Task, labels: Tensor, places: Sequence[int]) -> None:
    batches = Batches(dataset, task.collate, torch.device("cpu"))
    task.model.eval()
    with torch.no_grad():
        try:
            task.loss(task.model, batches.rows(places))
        except IndexError as whole:
            for place in places:
                try:
                    task.loss(task.model, batches.rows([place]))
                except IndexError as error:
                    raise DatasetError(
                        "ESP-342",
                        f"{name} row {place}: label {int(labels[place])} is out of range ({last_line(error)})",
                        hint="Count labels from 0 and give the model one output a class",
                    ) from error
            raise TargetError("ESP-313", f"task.loss raised on {name}: {last_line(whole)}") from whole
        except Exception as error:
            raise TargetError("ESP-313", f"task.loss raised on {name}: {last_line(error)}") from error


def _check_loss(task: Task, batch_size: int) -> None:
    batch = _first_batch("train", task.train, task, batch_size)
    with _explained("task.loss raised on the first batch:", "It is called as loss(model, batch)"):
        loss = task.loss(task.model, batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise TargetError(
            "ESP-312", f"task.loss returned {found}, not one scalar", hint="Return the mean over the batch"
        )
    if not loss.requires_grad:
        raise TargetError("ESP-312", "task.loss returned a value without a gradient", hint="Do not detach it")
    if not math.isfinite(loss.item()):
        raise DatasetError("ESP-343", f"train: the loss of the first batch is {loss.item()}", hint="Scale the inputs")
    _check_backward(task.model, loss)


def _check_metrics(task: Task, batch_size: int) -> None:
    if task.metrics is None:
        return
    rows = min(batch_size, len(task.validation))  # type: ignore[arg-type]
    batch = _first_batch("validation", task.validation, task, rows)
    task.model.eval()
    what = "task.metrics raised on the first batch of validation:"
    with torch.no_grad(), _explained(what, "It is called as metrics(model, batch)"):
        found = task.metrics(task.model, batch)
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise TargetError(
            "ESP-312",
            f"task.metrics returned a {type(found).__name__}, not a dict of tensors",
            hint='Return names to tensors, such as {"accuracy": correct.float()}',
        )


def _check_optimizer(task: Task) -> None:
    if task.optimizer is None:
        return
    with _explained("task.optimizer raised:", "It is called as optimizer(model.parameters())"):
        found = task.optimizer(task.model.parameters())
    if not isinstance(found, Optimizer):
        raise TargetError("ESP-312", f"task.optimizer returned a {type(found).__name__}, not a torch.optim.Optimizer")


def _check_backward(model: nn.Module, loss: Tensor) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    except RuntimeError as error:
        raise TargetError("ESP-313", f"the loss of the first batch has no backward: {last_line(error)}") from error
    if all(gradient is None for gradient in gradients):
        raise TargetError("ESP-312", "task.loss does not depend on task.model", hint="Compute it from model(...)")


def _spread(rows: int) -> list[int]:
    if rows <= SAMPLED_ROWS:
        return list(range(rows))
    return sorted({round(number * (rows - 1) / (SAMPLED_ROWS - 1)) for number in range(SAMPLED_ROWS)})


def _row(name: str, dataset: Dataset[Any], index: int) -> Any:
    with _explained(f"{name}[{index}] raised", _YOUR_DATA):
        return dataset[index]


def _first_batch(name: str, dataset: Dataset[Any], task: Task, rows: int) -> Any:
    hint = f"{_YOUR_DATA}; rows that differ need a collate function of the task"
    with _explained(f"making the first batch of {name} raised", hint):
        return Batches(dataset, task.collate, torch.device("cpu")).rows(range(rows))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for key in sorted(value):
            yield from _tensors(value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _shapes(shape: tuple[Any, ...]) -> str:
    return ", ".join(str(size) for size, _ in shape)


@contextmanager
def _explained(what: str, hint: str) -> Iterator[None]:
    """Inside, the task's own code runs, which may raise anything, also an exit."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise TargetError("ESP-313", f"{what} {last_line(error)}", hint=hint) from error
