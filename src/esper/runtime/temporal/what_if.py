"""What a run's workflow would have ordered had one decision been another: the edited history, replayed on the code.

Nothing is trained and no server is needed. The result of the decision's child workflow is exchanged in a copy of the
history; replaying it records every command that the workflow gives, up to the first one that the history does not
have: from there on the past is another, and nobody knows how it would have gone on.
"""

import base64
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from temporalio.client import WorkflowHistory
from temporalio.worker import Replayer

from esper.contracts.operational import AdaptationDecision
from esper.contracts.orders import DecisionRequest
from esper.errors import NotFoundError
from esper.runtime.temporal.commanded import Command
from esper.runtime.temporal.commanded import Recording
from esper.runtime.temporal.history_document import first_payload
from esper.runtime.temporal.history_document import parse_history
from esper.runtime.temporal.plugin import EsperPlugin
from esper.runtime.temporal.replay import quiet_runtime


@dataclass(frozen=True)
class RecordedDecision:
    """A decision in a history: what its child was asked, what it answered, and at which event."""

    event_id: int
    request: DecisionRequest
    decision: AdaptationDecision


@dataclass(frozen=True)
class Difference:
    """The first command that differs. None on one side: there nothing more was ordered."""

    recorded: Command | None
    would_be: Command | None


def recorded_decision(history: str | dict[str, Any], epoch: int) -> RecordedDecision:
    """The decision on one epoch as the run's history has it. Raises `NotFoundError` (ESP-505)."""
    events = parse_history(history)["events"]
    asked: dict[int, bytes] = {}
    decided: list[int] = []
    for event in events:
        started = event.get("startChildWorkflowExecutionInitiatedEventAttributes", {})
        if (of := _epoch(started.get("workflowId", ""))) is not None:
            asked[of] = first_payload(started["input"])
        completed = event.get("childWorkflowExecutionCompletedEventAttributes", {})
        if (of := _decided_epoch(completed)) is None:
            continue
        if of == epoch and of in asked:
            request = DecisionRequest.model_validate_json(asked[of])
            decision = AdaptationDecision.model_validate_json(first_payload(completed["result"]))
            return RecordedDecision(int(event["eventId"]), request, decision)
        decided.append(of)
    known = f"this history holds decisions on epochs {decided[0]} to {decided[-1]}" if decided else "it holds none"
    raise NotFoundError("ESP-505", f"no decision on epoch {epoch} was taken: {known}")


def with_decision(history: str | dict[str, Any], epoch: int, decision: AdaptationDecision) -> dict[str, Any]:
    """A copy of the history in which that decision was taken."""
    document = copy.deepcopy(parse_history(history))
    for event in document["events"]:
        completed = event.get("childWorkflowExecutionCompletedEventAttributes", {})
        if _decided_epoch(completed) == epoch:
            data = base64.b64encode(decision.model_dump_json().encode()).decode()
            completed["result"]["payloads"][0]["data"] = data
    return document


async def first_difference(
    recorded: str | dict[str, Any], edited: str | dict[str, Any], workflows: Sequence[type]
) -> Difference | None:
    """The first command that the edited history leads to and the recorded one does not; None when there is none."""
    before, after = await _commands(recorded, workflows), await _commands(edited, workflows)
    pairs = (Difference(first, second) for first, second in zip_longest(before, after))
    return next((pair for pair in pairs if pair.recorded != pair.would_be), None)


async def _commands(history: str | dict[str, Any], workflows: Sequence[type]) -> list[Command]:
    document = parse_history(history)
    workflow_id = document["events"][0]["workflowExecutionStartedEventAttributes"]["workflowId"]
    recording = Recording()
    replayer = Replayer(workflows=workflows, plugins=[EsperPlugin()], interceptors=[recording], runtime=quiet_runtime())
    # An edited history fails to replay where it differs: that is what is looked for.
    await replayer.replay_workflow(WorkflowHistory.from_json(workflow_id, document), raise_on_replay_failure=False)
    return recording.commands


def _decided_epoch(completed: dict[str, Any]) -> int | None:
    """The epoch that a child which completed has decided on; None for any other child."""
    return _epoch(completed.get("workflowExecution", {}).get("workflowId", ""))


def _epoch(workflow_id: str) -> int | None:
    _, found, epoch = workflow_id.rpartition("/tamiyo/")
    return int(epoch) if found else None
