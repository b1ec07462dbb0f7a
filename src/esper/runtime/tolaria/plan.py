"""Everything about a run's training that never changes while it trains, shared by the live model and its twins."""

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from esper.contracts.config import EsperConfig
from esper.contracts.config import KasminaConfig
from esper.errors import DatasetError
from esper.runtime.kasmina.model import wrap
from esper.runtime.kasmina.wrapping.targets import Target
from esper.runtime.kasmina.wrapping.undisturbed import undisturbed
from esper.runtime.tolaria.data.data_checks import check_task
from esper.runtime.tolaria.data.identity import identity
from esper.runtime.tolaria.device import choose_device
from esper.runtime.tolaria.device import choose_threads
from esper.runtime.tolaria.device import use_threads
from esper.runtime.tolaria.evaluation import judge_chunks
from esper.runtime.tolaria.evaluation import split_validation
from esper.runtime.tolaria.randomness import preserved_random_state
from esper.runtime.tolaria.recipe import build_optimizer
from esper.runtime.tolaria.sampler import Batches
from esper.runtime.tolaria.sampler import steps_per_epoch
from esper.runtime.tolaria.schedule import Schedule
from esper.runtime.tolaria.schedule import remember_base_rates
from esper.runtime.tolaria.tasks import Task
from esper.runtime.tolaria.tasks import fresh_model
from esper.runtime.tolaria.tasks import load_task

PROBE_ROWS = 512
PROBE_SEED = 20_021


@dataclass(frozen=True)
class TrainingPlan:
    """`reported` and `judged` are row numbers of the validation data; `probed` of the training data."""

    config: EsperConfig
    device: torch.device
    threads: int
    train: Batches
    validation: Batches
    test: Batches | None
    loss: Callable[[nn.Module, Any], Tensor]
    metrics: Callable[[nn.Module, Any], dict[str, Tensor]] | None
    task_optimizer: Callable[[Any], Optimizer] | None
    reported: Tensor
    judged: tuple[Tensor, ...]
    probed: Tensor
    schedule: Schedule
    steps_per_epoch: int
    model_name: str
    data_digest: str | None
    identity: Mapping[str, JsonValue]
    """What model and data are, beyond the configuration: `identity.identity`."""

    @property
    def total_steps(self) -> int:
        return self.schedule.total_steps

    @property
    def judge_rows(self) -> int:
        return sum(len(chunk) for chunk in self.judged)

    @property
    def hold_steps(self) -> int:
        """The least number of steps between a graft and its verdict."""
        tamiyo = self.config.tamiyo
        return max(tamiyo.hold_epochs * self.steps_per_epoch, tamiyo.hold_steps)

    def judge_step(self, apply_step: int) -> int:
        """Where a graft at `apply_step` is judged: after the hold, at the end of an epoch."""
        return steps_per_epoch(apply_step + self.hold_steps, self.steps_per_epoch) * self.steps_per_epoch

    def optimizer(self, model: nn.Module) -> Optimizer:
        """The task's own optimizer, else the configured one, with each group's base learning rate noted."""
        if self.task_optimizer is not None:
            optimizer = self.task_optimizer(model.parameters())
        else:
            optimizer = build_optimizer(self.config.optimizer, model.parameters())
        remember_base_rates(optimizer)
        return optimizer

    def another_model(self) -> nn.Module:
        """The model as a new run would begin with it, wrapped; the global generators are left as they were."""
        model = fresh_model(self.config.task, self.config.run.seed).to(self.device)
        return wrapped(model, self.config.kasmina, self.first_batch(), self.loss)

    def first_batch(self) -> Any:
        """Two rows of the training data: enough to see which layers are called."""
        return self.train.peek(range(min(2, len(self.train))))


def prepare(config: EsperConfig) -> tuple[TrainingPlan, nn.Module]:
    """The plan of a run and its wrapped model, seeded as the recipe says.

    Leaves the global generators where training begins. Raises the errors of `choose_device`, `load_task`,
    `check_task` and `wrap`.
    """
    device = choose_device(config.run.device)
    threads = choose_threads(config.run.threads)
    use_threads(threads)
    task = load_task(config.task, config.run.seed)
    with preserved_random_state():
        check_task(task, config.training.batch_size)
    known = identity(task)
    model = task.model.to(device)
    plan = _plan(config, device, threads, task, known)
    return plan, wrapped(model, config.kasmina, plan.first_batch(), task.loss)


def require_repeatable(config: EsperConfig, known: Mapping[str, JsonValue], data_digest: str | None) -> None:
    """Load the task once more where its data are `known` by their bytes and not by the task's own `data_digest`, and
    refuse those that are others every time: no process could go on with such a run.

    The global generators are left as they were. Raises `DatasetError` (ESP-346).
    """
    if data_digest is not None or "data" not in known:
        return
    with preserved_random_state():
        again = identity(load_task(config.task, config.run.seed))
    if again.get("data") != known["data"]:
        raise DatasetError(
            "ESP-346",
            "the task makes other data every time it is called: a run with them could not go on after a restart",
            hint="Draw them with a fixed seed (numpy.random.default_rng(0); torch, random and numpy's own global "
            "generators are seeded before the task is called), or say which data they are: esper.Task(data_digest=...)",
        )


def _plan(
    config: EsperConfig, device: torch.device, threads: int, task: Task, known: Mapping[str, JsonValue]
) -> TrainingPlan:
    rows = _rows(task.train)
    steps = steps_per_epoch(rows, config.training.batch_size)
    reported, judge_rows = split_validation(_rows(task.validation))
    probe_order = torch.randperm(rows, generator=torch.Generator().manual_seed(PROBE_SEED))
    return TrainingPlan(
        config=config,
        device=device,
        threads=threads,
        train=Batches(task.train, task.collate, device),
        validation=Batches(task.validation, task.collate, device),
        test=None if task.test is None else Batches(task.test, task.collate, device),
        loss=task.loss,
        metrics=task.metrics,
        task_optimizer=task.optimizer,
        reported=reported,
        judged=judge_chunks(judge_rows),
        probed=probe_order[:PROBE_ROWS].sort().values,
        schedule=Schedule(config.optimizer.schedule, config.run.max_epochs * steps),
        steps_per_epoch=steps,
        model_name=type(task.model).__name__,
        data_digest=task.data_digest,
        identity=known,
    )


def wrapped(model: nn.Module, config: KasminaConfig, batch: Any, loss: Callable[[nn.Module, Any], Tensor]) -> nn.Module:
    """`model`, wrapped as the configuration says, with one forward to prove which layers are really called."""
    wrap(
        model,
        "auto" if config.target_layers == "auto" else _targets(model, config.target_layers),
        exclude=_targets(model, config.exclude),
        seeds_per_layer=config.seeds_per_layer,
        cache_size_mb=config.cache_size_mb,
    )
    with undisturbed(model), torch.no_grad():
        loss(model, batch)
    return model


def _targets(model: nn.Module, names: tuple[str, ...]) -> list[Target]:
    """The layer classes of the model that bear one of the names; other names stay globs on dotted names."""
    classes: dict[str, type[nn.Module]] = {type(module).__name__: type(module) for module in model.modules()}
    return [classes.get(name, name) for name in names]


def _rows(dataset: Dataset[Any]) -> int:
    return len(dataset)  # type: ignore[arg-type]
