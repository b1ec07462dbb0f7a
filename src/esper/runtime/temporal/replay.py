"""Replays a workflow's stored history on the present code: clean, or the first divergence by event."""

import asyncio
import functools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from temporalio.client import WorkflowHistory
from temporalio.runtime import LogForwardingConfig
from temporalio.runtime import LoggingConfig
from temporalio.runtime import Runtime
from temporalio.runtime import TelemetryConfig
from temporalio.runtime import TelemetryFilter
from temporalio.worker import Interceptor
from temporalio.worker import Replayer
from temporalio.workflow import NondeterminismError

from esper.errors import IntegrityError
from esper.runtime.temporal.commanded import Command
from esper.runtime.temporal.commanded import Recording
from esper.runtime.temporal.history_document import parse_history
from esper.runtime.temporal.plugin import EsperPlugin

_SHORTEST = 3
"""Events before the first workflow task has started: nothing is replayed of fewer, and the replayer waits for more."""

_PREFIX_SECONDS = 20.0
"""For replaying one prefix; a divergence that is not found in time is reported without its event."""

_NOTHING = "nothing more"


@dataclass(frozen=True)
class ReplayReport:
    """What replaying one history found. `event_id` is that of the first event that the code does not lead to.

    `recorded` and `ordered` are the first order that the history has and the code does not give, and what it gives in
    its place; both None where the orders agree and something else differs, which `message` tells.
    """

    workflow_id: str
    workflow_type: str
    events: int
    clean: bool
    event_id: int | None = None
    message: str | None = None
    recorded: str | None = None
    ordered: str | None = None


async def replay_history(history: str | dict[str, Any], workflows: Sequence[type]) -> ReplayReport:
    """Replay one history in the JSON form that `temporal workflow show --output json` and Urza's store have.

    Needs no server. The workflow id is taken from the first event, because the ids of children derive from it.
    Raises `IntegrityError` (ESP-408) when the history cannot be read.
    """
    document = parse_history(history)
    workflow_id, workflow_type = _identity(document)
    events: list[dict[str, Any]] = document["events"]
    recording = Recording()
    failure = await _failure(workflow_id, events, workflows, [recording])
    if failure is None:
        return ReplayReport(workflow_id, workflow_type, len(events), clean=True)
    recorded, ordered = _first_difference(events, recording.commands)
    kind = "" if isinstance(failure, NondeterminismError) else f"{type(failure).__name__}: "
    return ReplayReport(
        workflow_id,
        workflow_type,
        len(events),
        clean=False,
        event_id=await _first_divergence(workflow_id, events, workflows),
        message=kind + _sentence(failure),
        recorded=recorded,
        ordered=ordered,
    )


async def _failure(
    workflow_id: str,
    events: list[dict[str, Any]],
    workflows: Sequence[type],
    interceptors: Sequence[Interceptor] = (),
) -> Exception | None:
    history = WorkflowHistory.from_json(workflow_id, {"events": events})
    replayer = Replayer(
        workflows=workflows, plugins=[EsperPlugin()], interceptors=interceptors, runtime=quiet_runtime()
    )
    return (await replayer.replay_workflow(history, raise_on_replay_failure=False)).replay_failure


def _first_difference(events: list[dict[str, Any]], commands: Sequence[Command]) -> tuple[str | None, str | None]:
    """The first order in which the history and the code differ; a side that orders nothing more says so."""
    before = [order for event in events if (order := _order_of(event)) is not None]
    after = [f"{command.kind} {command.what.partition(' (')[0]}".rstrip() for command in commands]
    for recorded, ordered in zip_longest(before, after, fillvalue=_NOTHING):
        if recorded != ordered:
            return recorded, ordered
    return None, None


def _order_of(event: dict[str, Any]) -> str | None:
    """The order that an event is the record of, in the words of `Command`."""
    if (activity := event.get("activityTaskScheduledEventAttributes")) is not None:
        return f"activity {activity['activityType']['name']}"
    if (child := event.get("startChildWorkflowExecutionInitiatedEventAttributes")) is not None:
        return f"child workflow {child['workflowId']}"
    if "workflowExecutionContinuedAsNewEventAttributes" in event:
        return "continue as new"
    return None


@functools.cache
def quiet_runtime() -> Runtime:
    """The SDK's core with its log lines in Python's logging: by itself it prints a warning for every divergence on
    stdout, where `--json` puts one document and nothing else."""
    lines = LogForwardingConfig(logger=logging.getLogger("temporalio.core"))
    filtered = TelemetryFilter(core_level="WARN", other_level="ERROR")
    return Runtime(telemetry=TelemetryConfig(logging=LoggingConfig(filter=filtered, forwarding=lines)))


async def _first_divergence(workflow_id: str, events: list[dict[str, Any]], workflows: Sequence[type]) -> int | None:
    """The server's core seldom names the event. A prefix diverges exactly when it holds the first diverging event,
    so halving finds it, in as many replays as the length has binary digits."""
    low, high = _SHORTEST, len(events)
    try:
        while low < high:
            middle = (low + high) // 2
            async with asyncio.timeout(_PREFIX_SECONDS):
                diverges = await _failure(workflow_id, events[:middle], workflows) is not None
            low, high = (low, middle) if diverges else (middle + 1, high)
    except TimeoutError:
        return None
    return int(events[high - 1]["eventId"])


def _sentence(failure: Exception) -> str:
    """What the core says, without the frame of its own structures."""
    text = " ".join(str(failure).split())
    found = re.search(r'message: "((?:[^"\\]|\\.)*)"', text)
    return found.group(1) if found else text


def _identity(document: dict[str, Any]) -> tuple[str, str]:
    first = document["events"][0]
    started = first.get("workflowExecutionStartedEventAttributes") if isinstance(first, dict) else None
    if not isinstance(started, dict) or "workflowId" not in started:
        raise IntegrityError("ESP-408", "the first event of the history is not the start of a workflow")
    return str(started["workflowId"]), str(started.get("workflowType", {}).get("name", ""))
