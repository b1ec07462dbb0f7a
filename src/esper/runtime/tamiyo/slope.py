"""How a run learns: its losses, their relative improvement from window to window, and how well it generalizes."""

import math
from collections.abc import Sequence

from esper.contracts.operational import LossPoint
from esper.contracts.orders import ScoreRequest


def losses(request: ScoreRequest) -> tuple[LossPoint, ...]:
    """The losses of all epochs up to the report's own, oldest first, each epoch once."""
    report = request.report
    points = {point.epoch: point for point in request.history if point.epoch < report.epoch}
    points[report.epoch] = LossPoint(
        epoch=report.epoch,
        step=report.step,
        train_loss=report.metrics.train_loss,
        val_loss=report.metrics.val_loss,
    )
    return tuple(points[epoch] for epoch in sorted(points))


def improvement_window(max_epochs: int) -> int:
    """Epochs in one window of the loss slope: a fifteenth of the run, so that a slope means the same share
    of the remaining work in a run of 20 epochs as in one of 2,000."""
    return max(1, round(max_epochs / 15))


def relative_improvement(values: Sequence[float], window: int) -> float | None:
    """How much lower the mean of the last `window` values is than that of the `window` before, relative to
    the latter; `None` with fewer than two windows."""
    if len(values) < 2 * window:
        return None
    before = math.fsum(values[-2 * window : -window]) / window
    last = math.fsum(values[-window:]) / window
    return (before - last) / max(abs(before), 1e-12)


def val_to_train(points: Sequence[LossPoint], window: int) -> float | None:
    """Validation loss over training loss, both summed over the last `window` epochs; `None` with fewer epochs,
    or where a loss is not positive and a ratio says nothing."""
    last = points[-window:]
    if len(last) < window or any(point.train_loss <= 0 or point.val_loss <= 0 for point in last):
        return None
    return math.fsum(point.val_loss for point in last) / math.fsum(point.train_loss for point in last)
