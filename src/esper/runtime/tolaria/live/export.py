"""The end of a run: what the final model is worth, and its files."""

import torch

from esper.contracts.assets import ArtifactRef
from esper.runtime.kasmina.keeping.persistence import saved_files
from esper.runtime.tolaria.evaluation import evaluate
from esper.runtime.tolaria.live.live_run import LiveRun
from esper.runtime.tolaria.store import SessionStore


def final_metrics(run: LiveRun) -> dict[str, float]:
    """`val_*` on the reported half of the validation data and, where the task has test data, `test_*` on all of it."""
    plan = run.trainee.plan
    splits = {"val": (plan.validation, plan.reported)}
    if plan.test is not None and len(plan.test):
        splits["test"] = plan.test, torch.arange(len(plan.test))
    metrics: dict[str, float] = {}
    for name, (batches, rows) in splits.items():
        size = plan.config.training.batch_size
        loss, extra = evaluate(run.trainee.model, batches, rows, size, plan.loss, plan.metrics, lambda: None)
        metrics |= {f"{name}_loss": loss} | {f"{name}_{key}": value for key, value in extra.items()}
    return metrics


def export_files(run: LiveRun, store: SessionStore) -> dict[str, ArtifactRef]:
    """Store the files that `esper.save` writes; file name to where its bytes lie."""
    return {name: store.put(data) for name, data in sorted(saved_files(run.trainee.model).items())}
