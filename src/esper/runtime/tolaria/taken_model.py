"""The model of a run outside of its session: put together from what Urza holds, to be taken away."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from esper.contracts.assets import ArtifactRef
from esper.contracts.config import EsperConfig
from esper.errors import GrowthError
from esper.runtime.kasmina.keeping.persistence import GROWTH_FILE
from esper.runtime.kasmina.keeping.persistence import WEIGHTS_FILE
from esper.runtime.kasmina.keeping.persistence import load
from esper.runtime.kasmina.wrapping.undisturbed import undisturbed
from esper.runtime.scratch import scratch_folder
from esper.runtime.tolaria.checkpoint import Get
from esper.runtime.tolaria.checkpoint import restore
from esper.runtime.tolaria.checkpoint import restore_model
from esper.runtime.tolaria.plan import wrapped
from esper.runtime.tolaria.sampler import Batches
from esper.runtime.tolaria.tasks import Task
from esper.runtime.tolaria.tasks import load_task

PROBE_ROWS = 8
"""Rows of the validation data that an export is checked on."""


@dataclass(frozen=True)
class TakenModel:
    """A run's grown model on the CPU, wrapped, with the task it was trained for."""

    model: nn.Module
    task: Task

    def example_call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with which the task's loss calls the model on the first rows of the validation data.

        Raises GrowthError ESP-438 for a task whose loss does not call the model itself.
        """
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        handle = self.model.register_forward_pre_hook(
            lambda module, args, keywords: calls.append((args, keywords)), with_kwargs=True
        )
        try:
            with undisturbed(self.model), torch.no_grad():
                self.model.eval()
                self.task.loss(self.model, _first_rows(self.task))
        finally:
            handle.remove()
        if not calls:
            raise GrowthError(
                "ESP-438",
                "the task's loss does not call the model itself, so its inputs are not known",
                hint="export without --format: weights and growth need no inputs",
            )
        return calls[0]


def finished_model(config: EsperConfig, files: Mapping[str, bytes]) -> TakenModel:
    """The final model, from the files that the trainer stored. Raises the errors of `load_task` and `load`."""
    task = load_task(config.task, config.run.seed)
    with scratch_folder("taken") as folder:
        for name in (GROWTH_FILE, WEIGHTS_FILE):
            (folder / name).write_bytes(files[name])
        return TakenModel(load(folder, task.model), task)


def head_model(config: EsperConfig, manifest: ArtifactRef, fetch: Get) -> TakenModel:
    """The model at a committed head. Raises the errors of `load_task`, `restore` and `restore_model`."""
    restored = restore(manifest, fetch)
    task = load_task(config.task, config.run.seed)
    model = wrapped(task.model, config.kasmina, _first_rows(task), task.loss)
    restore_model(model, restored)
    return TakenModel(model, task)


def plain_base(config: EsperConfig) -> nn.Module:
    """The task's model as a new run would begin with it. Raises the errors of `load_task`."""
    return load_task(config.task, config.run.seed).model


def _first_rows(task: Task) -> Any:
    batches = Batches(task.validation, task.collate, torch.device("cpu"))
    return batches.peek(range(min(PROBE_ROWS, len(batches))))
