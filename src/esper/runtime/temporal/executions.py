"""The executions of one workflow id as the server has them, oldest first: continue-as-new and resets followed back."""

from temporalio.client import Client
from temporalio.client import WorkflowHistory
from temporalio.service import RPCError
from temporalio.service import RPCStatusCode


async def executions(client: Client, workflow_id: str) -> list[tuple[str, WorkflowHistory]]:
    """Each as (Temporal run id, history); empty where the server knows no such workflow.

    A reset run begins with a copy of the events of the one that it was reset from, its run id included: so the id is
    the server's own, never that of the first event. Raises `RPCError`.
    """
    found: list[tuple[str, WorkflowHistory]] = []
    try:
        run_id = (await client.get_workflow_handle(workflow_id).describe()).run_id
        while run_id:
            history = await client.get_workflow_handle(workflow_id, run_id=run_id).fetch_history()
            found.insert(0, (run_id, history))
            run_id = _predecessor(history)
    except RPCError as error:
        # What came before may have been forgotten already.
        if error.status is not RPCStatusCode.NOT_FOUND:
            raise
    return found


def _predecessor(history: WorkflowHistory) -> str:
    for event in reversed(history.events):
        base = event.workflow_task_failed_event_attributes.base_run_id
        if base:
            return base
    return history.events[0].workflow_execution_started_event_attributes.continued_execution_run_id
