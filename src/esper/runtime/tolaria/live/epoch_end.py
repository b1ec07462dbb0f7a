"""What happens when an epoch is full: losses and metrics, early stopping, and the look at the health of each site."""

import math
from collections.abc import Callable

from esper.contracts.config import EarlyStopConfig
from esper.contracts.operational import Metrics
from esper.errors import ConfigurationError
from esper.errors import RunFailed
from esper.runtime.tolaria.evaluation import evaluate
from esper.runtime.tolaria.live.run_state import RunState
from esper.runtime.tolaria.live.run_state import watch
from esper.runtime.tolaria.trainee import Trainee


def measure_epoch(trainee: Trainee, tick: Callable[[], None]) -> Metrics:
    """Training loss of the epoch that just ended, and loss and metrics on the reported half of the validation data.

    Raises `RunFailed` (ESP-601) when one of them is not a finite number.
    """
    plan = trainee.plan
    train_loss = float(trainee.loss_sum) / max(1, trainee.loss_rows)
    val_loss, extra = evaluate(
        trainee.model,
        plan.validation,
        plan.reported,
        plan.config.training.batch_size,
        plan.loss,
        plan.metrics,
        tick,
    )
    for name, value in {"train_loss": train_loss, "val_loss": val_loss, **extra}.items():
        if not math.isfinite(value):
            raise RunFailed(
                "ESP-601",
                f"{name} is {value} after epoch {trainee.step // plan.steps_per_epoch}",
                hint="Lower optimizer.lr, or set optimizer.clip",
            )
    return Metrics(train_loss=train_loss, val_loss=val_loss, extra=extra)


def watch_early_stop(trainee: Trainee, state: RunState, metrics: Metrics, *, held: bool) -> RunState:
    """The state after early stopping, if configured, has seen the epoch that just ended."""
    config = trainee.plan.config.training.early_stop
    if config is None:
        return state
    epoch = trainee.step // trainee.plan.steps_per_epoch
    value = watched_value(config, metrics)
    return state.model_copy(update={"early_stop": watch(state.early_stop, config, value, epoch, held=held)})


def watched_value(config: EarlyStopConfig, metrics: Metrics) -> float:
    """The metric that early stopping watches. Raises `ConfigurationError` (ESP-204) with the names there are."""
    values = {"train_loss": metrics.train_loss, "val_loss": metrics.val_loss}
    values |= {f"val_{name}": value for name, value in metrics.extra.items()}
    if config.metric not in values:
        raise ConfigurationError(
            "ESP-204",
            f"training.early_stop.metric: the task has no {config.metric!r}",
            hint=f"Its metrics are: {', '.join(values)}",
        )
    return values[config.metric]
