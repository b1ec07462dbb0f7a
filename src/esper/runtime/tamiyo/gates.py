"""When a policy may grow at all: the gates before any site is looked at, each answering WAIT with its reason."""

from dataclasses import dataclass

from esper.contracts.enums import AdaptationState
from esper.contracts.operational import Adaptation
from esper.contracts.orders import ScoreRequest
from esper.runtime.tamiyo.features import HealthView
from esper.runtime.tamiyo.slope import improvement_window
from esper.runtime.tamiyo.slope import losses
from esper.runtime.tamiyo.thresholds import threshold

UNDER_WAY = (AdaptationState.ORDERED, AdaptationState.DELIVERED)


@dataclass(frozen=True)
class Wait:
    """Why nothing is ordered now: a stable word and a sentence with the numbers."""

    code: str
    reason: str


def occupied(request: ScoreRequest) -> Wait | None:
    """`busy` while a kernel is on its way, `hold` while a graft is on probation: one at a time, since a twin
    can tell what one graft was worth and not what two were."""
    in_flight = request.in_flight or _first(request, *UNDER_WAY)
    if in_flight is not None:
        return Wait("busy", f"the kernel of {in_flight} is still on its way; one adaptation is made at a time")
    held = request.report.held_adaptation
    if held is not None and not _ended(request, held):
        return Wait("hold", _held_reason(request, held))
    training = _first(request, AdaptationState.TRAINING)
    if training is not None:
        return Wait("hold", _held_reason(request, training))
    return None


def horizon(request: ScoreRequest) -> Wait | None:
    """`horizon` when a graft could no longer be delivered, held and judged before the run ends."""
    remaining = remaining_steps(request)
    needed = request.lag_epochs * request.steps_per_epoch + request.hold_window_steps
    if remaining < needed:
        return Wait(
            "horizon",
            f"{remaining} steps remain, and a graft needs {needed}: {request.lag_epochs} epoch(s) of "
            f"{request.steps_per_epoch} steps until it is delivered and {request.hold_window_steps} steps on probation",
        )
    return None


def late(request: ScoreRequest) -> Wait | None:
    """`horizon` in the last part of a run, where growth never paid."""
    total = request.max_epochs * request.steps_per_epoch
    limit = threshold("last_progress")
    if request.report.step > limit * total:
        return Wait(
            "horizon",
            f"step {request.report.step} of {total} is {request.report.step / total:.0%} of the run; "
            f"nothing is ordered after {limit:.0%}",
        )
    return None


def budget(request: ScoreRequest) -> Wait | None:
    """`budget` when as many adaptations were ordered as are allowed, whatever became of them: a build that
    fails for ever must not be ordered for ever."""
    ordered, allowed = request.forgotten.ordered + len(request.adaptations), request.tamiyo.max_adaptations
    if ordered >= allowed:
        return Wait("budget", f"{ordered} adaptations were ordered and tamiyo.max_adaptations is {allowed}")
    return None


def warmup(request: ScoreRequest) -> Wait | None:
    """`warmup` until the loss slope is known, over two windows of epochs."""
    known, window = len(losses(request)), improvement_window(request.max_epochs)
    if known < 2 * window:
        return Wait(
            "warmup", f"{known} epoch(s) are known, and a loss slope takes {2 * window}: two windows of {window}"
        )
    return None


def learning(request: ScoreRequest, graph: HealthView) -> Wait | None:
    """`learning` while the training loss still falls well: the host has not yet used what it has."""
    improvement = graph.run("train_improvement")
    limit = threshold("learning")
    if improvement is not None and improvement > limit:
        window = improvement_window(request.max_epochs)
        return Wait(
            "learning",
            f"the training loss fell by {improvement:.1%} from one window of {window} epoch(s) to the next; "
            f"growth waits until that is at most {limit:.1%}",
        )
    return None


def overfitting(graph: HealthView) -> Wait | None:
    """`overfitting` when the model does much worse on validation than on what it trains on: it has capacity that
    it spends on noise, and every blueprint would add more."""
    ratio = graph.run("val_to_train")
    limit = threshold("overfitting")
    if ratio is not None and ratio > limit:
        return Wait(
            "overfitting",
            f"the validation loss is {ratio:.2f} times the training loss, above {limit:.2f}: "
            f"capacity is not what is missing",
        )
    return None


def first_wait(request: ScoreRequest, graph: HealthView) -> Wait | None:
    """The first gate that is shut, in the order of what rules out most."""
    return (
        occupied(request)
        or budget(request)
        or horizon(request)
        or late(request)
        or warmup(request)
        or learning(request, graph)
        or overfitting(graph)
    )


def remaining_steps(request: ScoreRequest) -> int:
    """Optimizer steps between the report and the end of the run."""
    return max(0, request.max_epochs * request.steps_per_epoch - request.report.step)


def ended_step(request: ScoreRequest, adaptation: Adaptation) -> int:
    """The step at which an adaptation was over, or the latest step known of it."""
    if adaptation.judge is not None:
        return adaptation.judge.step
    if adaptation.apply_step is not None:
        return adaptation.apply_step
    return adaptation.epoch * request.steps_per_epoch


def _first(request: ScoreRequest, *states: AdaptationState) -> str | None:
    return next((each.adaptation_id for each in request.adaptations if each.state in states), None)


def _ended(request: ScoreRequest, adaptation_id: str) -> bool:
    """True when the record knows a verdict that the report, written an epoch earlier, does not."""
    alive = (*UNDER_WAY, AdaptationState.TRAINING)
    return any(each.adaptation_id == adaptation_id and each.state not in alive for each in request.adaptations)


def _held_reason(request: ScoreRequest, held: str) -> str:
    for adaptation in request.adaptations:
        if adaptation.adaptation_id == held and adaptation.apply_step is not None:
            end = adaptation.apply_step + request.hold_window_steps
            return (
                f"{held} ({adaptation.blueprint} at {adaptation.site}) is on probation until step {end}; "
                f"the report is of step {request.report.step}"
            )
    return f"{held} is on probation for {request.hold_window_steps} steps; one graft is held at a time"
