"""What is trained: the `Task` that a user's factory returns, and how a configuration leads to one."""

from collections.abc import Callable
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from esper.contracts.config import TaskConfig
from esper.errors import ConfigurationError
from esper.errors import TargetError
from esper.runtime.tolaria.data.installed import call_installed
from esper.runtime.tolaria.data.installed import installed_tasks
from esper.runtime.tolaria.data.installed import unknown_task
from esper.runtime.tolaria.data.quick_starts import PACKAGED_TASKS
from esper.runtime.tolaria.data.quick_starts import TaskParts
from esper.runtime.tolaria.data.targets import call_target
from esper.runtime.tolaria.randomness import preserved_random_state
from esper.runtime.tolaria.randomness import seed_everything


@dataclass(eq=False)
class Task:
    """One thing to train.

    `train`, `validation` and `test` are map-style datasets (`__len__` and `__getitem__`). `loss(model, batch)`
    returns one scalar, the mean over the batch. `metrics(model, batch)` returns tensors, each a mean over the
    batch or one value a row; means over all samples are reported. `optimizer(parameters)` makes the optimizer, else
    the configuration does. `collate(rows)` makes a batch, else `torch.utils.data.default_collate` does.
    `data_digest` says which data this is, where it may differ from one machine to the next: it is recorded with the
    run, and a run does not go on with other data.
    """

    model: nn.Module
    train: Dataset[Any]
    validation: Dataset[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    test: Dataset[Any] | None = None
    metrics: Callable[[nn.Module, Any], dict[str, Tensor]] | None = None
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    data_digest: str | None = None


def load_task(config: TaskConfig, seed: int) -> Task:
    """Seed the global generators with `seed`, then make the task: its weights are the first that is drawn.

    Raises `ConfigurationError` (ESP-206) for an unknown packaged task, `DataUnavailable` (ESP-207) when its data
    cannot be had, `TargetError` (ESP-310..313) for a user's own or an installed task that gives none.
    """
    if config.target is not None:
        seed_everything(seed)
        return _own(f"task.target {config.target!r}", call_target(config.target, config.arguments))
    name = config.name or ""
    factory = PACKAGED_TASKS.get(name)
    if factory is None:
        installed = installed_tasks()
        if name in installed:
            seed_everything(seed)
            return _own(f"installed task {name!r}", call_installed(installed[name], config.arguments))
        raise unknown_task(name, [*PACKAGED_TASKS, *installed])
    try:
        parts = factory(path=config.path, seed=seed, **config.arguments)
    except TypeError as error:
        raise ConfigurationError(
            "ESP-204", f"task.arguments of {name!r}: {error}", hint="Leave out what the task does not know"
        ) from error
    seed_everything(seed)
    return _task(parts)


def fresh_model(config: TaskConfig, seed: int) -> nn.Module:
    """The task's model as a new run would begin with it; the global generators are left as they were."""
    with preserved_random_state():
        return load_task(config, seed).model


def _task(parts: TaskParts) -> Task:
    return Task(
        model=parts.model(),
        train=parts.train,
        validation=parts.validation,
        loss=parts.loss,
        test=parts.test,
        metrics=parts.metrics,
        data_digest=parts.data_digest,
    )


def _own(what: str, made: object) -> Task:
    if not isinstance(made, Task):
        raise TargetError(
            "ESP-312",
            f"{what} returned {_described(made)}, not an esper.Task",
            hint="Return esper.Task(model=..., train=..., validation=..., loss=...)",
        )
    _check_fields(what, made)
    return made


def _check_fields(what: str, task: Task) -> None:
    problems: list[str] = []
    model: object = task.model
    if not isinstance(model, nn.Module):
        problems.append(f"model is {_described(model)}, not an nn.Module")
    for name in ("train", "validation", "test"):
        dataset = getattr(task, name)
        if dataset is None and name == "test":
            continue
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            problems.append(f"{name} is {_described(dataset)}, not a map-style dataset (__len__ and __getitem__)")
    for name in ("loss", "metrics", "optimizer", "collate"):
        function = getattr(task, name)
        if not callable(function) and (function is not None or name == "loss"):
            problems.append(f"{name} is {_described(function)}, not callable")
    if problems:
        raise TargetError("ESP-312", f"{what} returned a Task that cannot be trained: {'; '.join(problems)}")


def _described(value: object) -> str:
    return "None" if value is None else f"a {type(value).__module__}.{type(value).__qualname__}"
