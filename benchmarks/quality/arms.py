"""The arms that do not grow: what they are, and how one is trained, with Tolaria's own parts on one thread."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from esper.contracts.config import EsperConfig
from esper.runtime.configuration import load_config
from esper.runtime.kasmina import growth
from esper.runtime.kasmina.keeping.manifest import GrowthManifest
from esper.runtime.tezzeret.build import build_kernel
from esper.runtime.tezzeret.build import load_kernel
from esper.runtime.tezzeret.manifest import KernelManifest
from esper.runtime.tolaria.evaluation import evaluate
from esper.runtime.tolaria.live.flops import measure
from esper.runtime.tolaria.plan import TrainingPlan
from esper.runtime.tolaria.plan import prepare
from esper.runtime.tolaria.trainee import Trainee
from esper.runtime.tolaria.trainee import begin

LARGEST_WIDTH = 512


@dataclass(frozen=True)
class StaticRun:
    """One run without growth. `grown` is the growth manifest whose blocks stand in the model from step 0; `flops` is
    what its training may cost, which then decides the number of epochs."""

    quick_start: str
    seed: int
    lr: float
    hidden: int | None = None
    grown: dict[str, Any] | None = None
    flops: float | None = None

    def config(self, epochs: int | None = None) -> EsperConfig:
        overrides = [] if self.hidden is None else [f"task.arguments.hidden={self.hidden}"]
        overrides += [] if epochs is None else [f"run.max_epochs={epochs}"]
        return quick_start(self.quick_start, self.seed, self.lr, overrides)


def quick_start(name: str, seed: int, lr: float | None = None, overrides: Sequence[str] = ()) -> EsperConfig:
    """A quick start's configuration on one thread of the CPU; `lr` None keeps its own learning rate."""
    own = ["run.device=cpu", "run.threads=1", f"run.seed={seed}"] + ([] if lr is None else [f"optimizer.lr={lr}"])
    return load_config(None, quick_start=name, overrides=[*own, *overrides], environment={})


def plan_and_model(config: EsperConfig) -> tuple[TrainingPlan, nn.Module]:
    return prepare(config)


def plant(model: nn.Module, manifest: GrowthManifest, seed: int) -> None:
    """Put every grown block of the manifest into an untrained model: new first weights (Kaiming), zero last operation.

    The forge cannot align them with a residual gradient: before training there is none worth the name.
    """
    for site in manifest.sites:
        for grown in site.seeds:
            if grown.kernel_manifest is None:
                continue
            if grown.folded:
                raise ValueError(f"{site.site}: a folded block cannot be planted")
            kernel = KernelManifest.model_validate_json(grown.kernel_manifest)
            files = build_kernel(
                kernel.blueprint,
                kernel.site,
                kernel.hyperparameters,
                seed=(seed + 1) * 1_000 + grown.seed.index,
                samples=None,
                max_parameters=10**9,
            )
            growth.attach(model, site.site, load_kernel(files, files.digest), seed=grown.seed.index)


def train_static(run: StaticRun) -> dict[str, Any]:
    """Train to the end and measure: losses and accuracies, size, FLOPs and epochs."""
    trainee = _fresh(run, None)
    if run.flops is not None:
        epoch_flops = measure(trainee).training * len(trainee.plan.train)
        trainee = _fresh(run, max(1, round(run.flops / epoch_flops)))
    plan = trainee.plan
    while trainee.step < plan.total_steps:
        trainee.advance()
        if trainee.step % plan.steps_per_epoch == 0 and trainee.step < plan.total_steps:
            if not math.isfinite(float(trainee.loss_sum)):
                break
            trainee.end_epoch()
    cost = measure(trainee).training
    return {
        **final_losses(trainee),
        "train_loss": float(trainee.loss_sum) / max(1, trainee.loss_rows),
        "parameters": trainee.parameters,
        "epochs": trainee.step / plan.steps_per_epoch,
        "flops": cost * len(plan.train) * trainee.step / plan.steps_per_epoch,
    }


def final_losses(trainee: Trainee) -> dict[str, float]:
    """`val_*` on the reported half of the validation rows, `test_*` on all test rows, as a run reports them."""
    plan = trainee.plan
    assert plan.test is not None
    found: dict[str, float] = {}
    for name, batches, rows in (
        ("val", plan.validation, plan.reported),
        ("test", plan.test, torch.arange(len(plan.test))),
    ):
        size = plan.config.training.batch_size
        loss, metrics = evaluate(trainee.model, batches, rows, size, plan.loss, plan.metrics, lambda: None)
        found |= {f"{name}_loss": loss} | {f"{name}_{key}": value for key, value in metrics.items()}
    return found


def hidden_width_of_size(parameters: int) -> int:
    """The width of the `digits` network 64-h-h-10 whose number of parameters is nearest to the given one."""
    return min(range(1, LARGEST_WIDTH), key=lambda h: abs(65 * h + (h + 1) * h + (h + 1) * 10 - parameters))


def _fresh(run: StaticRun, epochs: int | None) -> Trainee:
    plan, model = plan_and_model(run.config(epochs))
    if run.grown is not None:
        plant(model, GrowthManifest.model_validate(run.grown, strict=False), run.seed)
    return begin(plan, model)
