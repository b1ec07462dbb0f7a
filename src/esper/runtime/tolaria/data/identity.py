"""What a task is made of, as far as it can be known without training: the host model's structure and the data.

A checkpoint notes it, so that a run that is to go on with another model or with other data is noticed by name.
"""

import hashlib
import json
from collections.abc import Sized

import torch
from pydantic import JsonValue
from torch import nn
from torch.utils.data import TensorDataset

from esper.runtime.tolaria.tasks import Task

LARGEST_BYTES = 2**30
"""Data in memory up to this size are read whole: a second or two, once a load."""


def identity(task: Task) -> dict[str, JsonValue]:
    """By name: class, parameter count and structure (a digest of all names, shapes and dtypes) of the model; the rows
    of train, validation and test; and the digest of the data, where the task says it or all of it are tensors."""
    model, splits = task.model, (task.train, task.validation, task.test)
    rows: list[JsonValue] = [len(split) if isinstance(split, Sized) else None for split in splits]
    found: dict[str, JsonValue] = {
        "model.class": type(model).__name__,
        "model.parameters": sum(parameter.numel() for parameter in model.parameters()),
        "model.structure": _structure(model),
        "data.rows": rows,
    }
    digest = task.data_digest if task.data_digest is not None else _digest(splits)
    return found if digest is None else found | {"data": digest}


def _structure(model: nn.Module) -> str:
    tensors = (*model.named_parameters(), *model.named_buffers())
    lines = sorted([name, str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors)
    return f"sha256:{hashlib.sha256(json.dumps(lines).encode()).hexdigest()}"


def _digest(splits: tuple[object, ...]) -> str | None:
    tensors: list[torch.Tensor] = []
    for split in splits:
        if split is not None and type(split) is not TensorDataset:
            return None
        tensors += split.tensors if isinstance(split, TensorDataset) else ()
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) > LARGEST_BYTES:
        return None
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"
