"""Replays a workflow's stored history on the present code: clean, or the first divergence by event."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from temporalio.client import WorkflowHistory
from temporalio.worker import Replayer
from temporalio.workflow import NondeterminismError

from esper.errors import IntegrityError
from esper.runtime.temporal.plugin import EsperPlugin

_EVENT_ID = re.compile(r"HistoryEvent\(id: (\d+)|event[ _]id:? (\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class ReplayReport:
    """What replaying one history found. `event_id` is that of the first divergence where the server's core names it."""

    workflow_id: str
    workflow_type: str
    events: int
    clean: bool
    event_id: int | None = None
    message: str | None = None


async def replay_history(history: str | dict[str, Any], workflows: Sequence[type]) -> ReplayReport:
    """Replay one history in the JSON form that `temporal workflow show --output json` and Urza's store have.

    Needs no server. The workflow id is taken from the first event, because the ids of children derive from it.
    Raises `IntegrityError` (ESP-408) when the history cannot be read.
    """
    document = parse_history(history)
    workflow_id, workflow_type = _identity(document)
    report = ReplayReport(workflow_id, workflow_type, len(document["events"]), clean=True)
    replayer = Replayer(workflows=workflows, plugins=[EsperPlugin()])
    result = await replayer.replay_workflow(
        WorkflowHistory.from_json(workflow_id, document), raise_on_replay_failure=False
    )
    if result.replay_failure is None:
        return report
    message = " ".join(str(result.replay_failure).split())
    found = _EVENT_ID.search(message)
    event_id = int(next(group for group in found.groups() if group)) if found else None
    kind = "" if isinstance(result.replay_failure, NondeterminismError) else f"{type(result.replay_failure).__name__}: "
    return ReplayReport(workflow_id, workflow_type, report.events, False, event_id, kind + message)


def parse_history(history: str | dict[str, Any]) -> dict[str, Any]:
    """The history as a mapping with its events. Raises `IntegrityError` (ESP-408) when it is not one."""
    try:
        document = json.loads(history) if isinstance(history, str) else history
    except (ValueError, RecursionError) as error:
        raise IntegrityError("ESP-408", f"the history is not JSON: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("events"), list) or not document["events"]:
        raise IntegrityError(
            "ESP-408",
            "the history holds no list of events",
            hint="Give the JSON of `temporal workflow show --output json`, or a run id",
        )
    return document


def _identity(document: dict[str, Any]) -> tuple[str, str]:
    first = document["events"][0]
    started = first.get("workflowExecutionStartedEventAttributes") if isinstance(first, dict) else None
    if not isinstance(started, dict) or "workflowId" not in started:
        raise IntegrityError("ESP-408", "the first event of the history is not the start of a workflow")
    return str(started["workflowId"]), str(started.get("workflowType", {}).get("name", ""))
