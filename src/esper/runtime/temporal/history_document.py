"""A workflow history in its JSON form: how it is read, and what its events are called."""

import base64
import json
from typing import Any

from esper.errors import IntegrityError

ENDINGS = {
    "workflowExecutionCompletedEventAttributes": "completed",
    "workflowExecutionFailedEventAttributes": "failed",
    "workflowExecutionTimedOutEventAttributes": "timed out",
    "workflowExecutionCanceledEventAttributes": "cancelled",
    "workflowExecutionTerminatedEventAttributes": "terminated",
    "workflowExecutionContinuedAsNewEventAttributes": "continued as new",
}
"""What the last event of a closed execution holds, and what that means in words."""


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


def first_payload(payloads: Any) -> bytes:
    """The bytes of the first argument, or of the result. Raises `KeyError`, `IndexError`, `TypeError` or `ValueError`
    where there is none."""
    return base64.b64decode(payloads["payloads"][0]["data"])
