"""The report of an epoch of which a test says only what it is about."""

from typing import Any

from esper.contracts.operational import EpochReport
from esper.contracts.operational import HeadRef
from esper.contracts.operational import LayerGraph
from esper.contracts.operational import Metrics


def plain_report(run_id: str, head: HeadRef, **known: Any) -> EpochReport:
    """`head` ends the epoch; `known` are fields that must not be the plain ones."""
    plain: dict[str, Any] = {
        "epoch": head.epoch,
        "step": head.step,
        "metrics": Metrics(train_loss=1.0, val_loss=1.0),
        "learning_rate": 0.1,
        "samples": 1,
        "parameters": 1,
        "training_flops": 0.0,
        "probe_flops": 0.0,
        "busy_seconds": 0.0,
        "stall_seconds": 0.0,
        "graph": LayerGraph(nodes=(), edges=()),
        "health": (),
    }
    return EpochReport(run_id=run_id, head=head, **plain | known)
