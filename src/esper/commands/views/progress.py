"""What happened in a run between two looks at it, as events in the order in which they happened."""

from dataclasses import dataclass

from esper.contracts.enums import AdaptationState
from esper.contracts.enums import Outcome
from esper.contracts.operational import Adaptation
from esper.contracts.operational import EpochReport
from esper.runtime.run_document import RunView
from esper.runtime.run_document import seed_states

WORDS = {
    AdaptationState.ORDERED: "ordered",
    AdaptationState.DELIVERED: "delivered",
    AdaptationState.TRAINING: "grafted",
    AdaptationState.FOSSILIZED: "kept",
    AdaptationState.CULLED: "culled",
    AdaptationState.MISSED: "missed",
    AdaptationState.FAILED: "failed",
    AdaptationState.VETOED: "vetoed",
    AdaptationState.STALE: "stale",
}
_PATHS = {
    AdaptationState.ORDERED: (AdaptationState.ORDERED,),
    AdaptationState.DELIVERED: (AdaptationState.ORDERED, AdaptationState.DELIVERED),
    AdaptationState.TRAINING: (AdaptationState.ORDERED, AdaptationState.DELIVERED, AdaptationState.TRAINING),
    AdaptationState.FOSSILIZED: (
        AdaptationState.ORDERED,
        AdaptationState.DELIVERED,
        AdaptationState.TRAINING,
        AdaptationState.FOSSILIZED,
    ),
    AdaptationState.CULLED: (
        AdaptationState.ORDERED,
        AdaptationState.DELIVERED,
        AdaptationState.TRAINING,
        AdaptationState.CULLED,
    ),
}
"""The states an adaptation has passed when it is seen in one; any other state follows `ORDERED` directly."""


@dataclass(frozen=True)
class Event:
    """One thing that happened at a step: its name and what belongs to it, in reading order."""

    step: int
    rank: int
    name: str
    values: tuple[tuple[str, str], ...]


def events_between(before: RunView | None, after: RunView) -> tuple[Event, ...]:
    """What is new in `after`; everything so far when there is no `before`."""
    known_epoch = before.reports[-1].epoch if before is not None and before.reports else 0
    states = {adaptation.adaptation_id: adaptation.state for adaptation in before.adaptations} if before else {}
    events = [_epoch(report) for report in after.reports if report.epoch > known_epoch]
    for adaptation in after.adaptations:
        passed = _path(states.get(adaptation.adaptation_id))
        events += [_adaptation(adaptation, state, after) for state in _path(adaptation.state) if state not in passed]
    events.sort(key=lambda event: (event.step, event.rank))
    outcome = before.record.outcome if before is not None else Outcome.RUNNING
    if after.record.outcome is not outcome:
        step = max(after.record.steps, after.last.step if after.last else 0)
        events.append(Event(step, 9, after.record.outcome.value, (("run", after.record.run_id), ("step", str(step)))))
    return tuple(events)


def one_line(event: Event) -> str:
    """`key=value` pairs; values with spaces are quoted."""
    pairs = event.values if event.name == "epoch" else (("event", event.name), *event.values)
    return " ".join(f"{name}={_quoted(value)}" for name, value in pairs)


def sentence(event: Event) -> str:
    """An event that is not an epoch, as a person reads it."""
    values = dict(event.values)
    reason = values.pop("reason", "")
    what = " ".join(f"{name} {value}" for name, value in values.items() if name not in {"adaptation", "run"})
    subject = values.get("adaptation") or values.get("run", "")
    return f"{event.name:<9} {subject}  {what}" + (f"  ({reason})" if reason else "")


def _path(state: AdaptationState | None) -> tuple[AdaptationState, ...]:
    if state is None:
        return ()
    return _PATHS.get(state, (AdaptationState.ORDERED, state))


def _epoch(report: EpochReport) -> Event:
    metrics = report.metrics
    values = [
        ("epoch", str(report.epoch)),
        ("step", str(report.step)),
        ("train_loss", f"{metrics.train_loss:.4g}"),
        ("val_loss", f"{metrics.val_loss:.4g}"),
        *((f"val_{name}", f"{value:.4g}") for name, value in metrics.extra.items()),
        ("parameters", str(report.parameters)),
        ("seeds", ",".join(f"{state}:{count}" for state, count in seed_states(report).items())),
    ]
    return Event(report.step, 0, "epoch", tuple(values))


def _adaptation(adaptation: Adaptation, state: AdaptationState, view: RunView) -> Event:
    values = [
        ("adaptation", adaptation.adaptation_id),
        ("site", adaptation.site),
        ("blueprint", adaptation.blueprint),
    ]
    step = _step_of_epoch(adaptation.epoch, view)
    rank = 1
    if state is AdaptationState.ORDERED:
        values.append(("epoch", str(adaptation.epoch)))
        if adaptation.apply_step is not None:
            values.append(("apply_step", str(adaptation.apply_step)))
    elif state is AdaptationState.DELIVERED:
        rank = 2
    else:
        rank = 3 if state is AdaptationState.TRAINING else 4
        judged = adaptation.judge.step if adaptation.judge is not None and rank == 4 else None
        step = judged if judged is not None else adaptation.apply_step if adaptation.apply_step is not None else step
        values.append(("step", str(step)))
    if state in {AdaptationState.FOSSILIZED, AdaptationState.CULLED} and adaptation.judge is not None:
        values += [
            (name, f"{value:.4g}")
            for name, value in (("gain", adaptation.judge.gain), ("lower_bound", adaptation.judge.gain_lower_bound))
            if value is not None
        ]
    if state is adaptation.state and adaptation.reason and state is not AdaptationState.DELIVERED:
        values.append(("reason", adaptation.reason))
    return Event(step, rank, WORDS[state], tuple(values))


def _step_of_epoch(epoch: int, view: RunView) -> int:
    return max((report.step for report in view.reports if report.epoch <= epoch), default=0)


def _quoted(value: str) -> str:
    plain = " ".join(value.split())
    return f'"{plain}"' if " " in plain or not plain else plain
