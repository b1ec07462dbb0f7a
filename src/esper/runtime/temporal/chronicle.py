"""What the histories of a run's workflow tell that Urza's rows do not: its executions, trainers and messages, and when.

A chronicle holds what people ask about afterwards. Epochs and decisions are left to Urza, which has them with their
numbers.
"""

import json
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from esper.contracts.enums import Topic
from esper.runtime.temporal.history_document import ENDINGS
from esper.runtime.temporal.history_document import first_payload

Event = dict[str, Any]

_SIGNALS = frozenset(topic.value.replace(".", "_") for topic in (Topic.KERNEL_READY, Topic.KERNEL_FAILED))
_TRAINER_LOST = Topic.TRAINER_LOST.value.replace(".", "_")
_CLAIM = "claim_trainer"


@dataclass(frozen=True)
class Happening:
    """One thing that happened: when (ISO 8601, UTC), in which execution (from 0) and event of its history."""

    time: str
    execution: int
    event_id: int
    kind: str
    """`execution`, `trainer` or `message`."""
    text: str


def chronicle(histories: Sequence[dict[str, Any]]) -> tuple[Happening, ...]:
    """Of the executions of one run in their order, each as the JSON form of its history."""
    return tuple(
        Happening(str(event.get("eventTime", "")), number, int(event["eventId"]), kind, text)
        for number, history in enumerate(histories)
        for event, kind, text in _told(history["events"])
    )


def _told(events: Sequence[Event]) -> Iterator[tuple[Event, str, str]]:
    ordered: dict[str, str] = {}
    strange: Counter[str] = Counter()
    for event in events:
        kind, content = _content(event)
        if kind == "activityTaskScheduledEventAttributes":
            ordered[event["eventId"]] = content["activityType"]["name"]
        elif kind == "workflowExecutionStartedEventAttributes":
            yield event, "execution", "continues" if content.get("continuedExecutionRunId") else "begins"
        elif kind in ENDINGS:
            reason = content.get("reason") or content.get("failure", {}).get("message") or ""
            yield event, "execution", f"{ENDINGS[kind]}{': ' if reason else ''}{reason}"
        elif kind == "workflowTaskFailedEventAttributes" and content.get("baseRunId"):
            yield event, "execution", f"was reset to here from execution {content['baseRunId']}"
        elif kind == "workflowExecutionSignaledEventAttributes":
            name = content["signalName"]
            if name == _TRAINER_LOST:
                yield event, "trainer", f"reported dead: {_message(content).get('payload', {}).get('reason', '')}"
            elif name in _SIGNALS:
                yield event, "message", f"{name} {_subject(content)}"
            else:
                strange[name] += 1
        elif kind == "workflowExecutionUpdateAcceptedEventAttributes":
            asked = content["acceptedRequest"]["input"]
            yield event, "message", f"{asked['name']} by {_message(asked, 'args').get('sender', 'somebody')}"
        elif kind == "workflowExecutionCancelRequestedEventAttributes":
            yield event, "message", "cancelled in the Web UI: stop"
        elif (trainer := _trainer(kind, content, ordered)) is not None:
            yield event, "trainer", trainer
    for name, count in strange.items():
        yield events[-1], "message", f"{count} of no known kind ({name[:60]})"


def _trainer(kind: str, content: Event, ordered: dict[str, str]) -> str | None:
    """What an activity's end says of the trainer: a new lease, or work that it did not finish."""
    what = ordered.get(str(content.get("scheduledEventId")), "")
    if kind == "activityTaskCompletedEventAttributes" and what == _CLAIM:
        lease = _decoded(content["result"])
        return f"lease {lease.get('lease_gen')} on {lease.get('task_queue')}"
    if kind == "activityTaskTimedOutEventAttributes":
        cause = content.get("failure", {}).get("timeoutFailureInfo", {}).get("timeoutType", "")
        return f"{what}: {cause.removeprefix('TIMEOUT_TYPE_').lower().replace('_', ' ')} time-out"
    if kind == "activityTaskFailedEventAttributes":
        return f"{what} failed: {content.get('failure', {}).get('message', '')}"
    return None


def _content(event: Event) -> tuple[str, Event]:
    return next(((key, value) for key, value in event.items() if key.endswith("EventAttributes")), ("", {}))


def _subject(content: Event) -> str:
    payload = _message(content).get("payload", {})
    delivery = payload.get("delivery", {}) if isinstance(payload, dict) else {}
    return str(delivery.get("adaptation", {}).get("adaptation_id") or payload.get("adaptation_id") or "(unreadable)")


def _message(content: Event, key: str = "input") -> Event:
    """The first argument; empty when it is no JSON object."""
    return _decoded(content.get(key) or {})


def _decoded(payloads: Event) -> Event:
    try:
        value = json.loads(first_payload(payloads))
    except (KeyError, IndexError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
