"""The executions of one workflow id on a server, along their continue-as-new chain."""

from temporalio.client import Client
from temporalio.client import WorkflowHistory

MOST_EVENTS = 4_500
MOST_BYTES = 5 * 2**20


async def chain(client: Client, workflow_id: str) -> list[WorkflowHistory]:
    """Their histories, oldest first."""
    found: list[WorkflowHistory] = []
    run_id: str | None = None
    while True:
        history = await client.get_workflow_handle(workflow_id, run_id=run_id).fetch_history()
        found.insert(0, history)
        run_id = history.events[0].workflow_execution_started_event_attributes.continued_execution_run_id
        if not run_id:
            return found


def size_bytes(history: WorkflowHistory) -> int:
    """What the events of one execution weigh."""
    return sum(event.ByteSize() for event in history.events)


def input_bytes(history: WorkflowHistory) -> int:
    """What an execution was started with."""
    started = history.events[0].workflow_execution_started_event_attributes
    return sum(len(payload.data) for payload in started.input.payloads)
