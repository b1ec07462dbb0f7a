"""`workflow reset`, for which the SDK has no wrapper."""

import json
import uuid

from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import ResetWorkflowExecutionRequest
from temporalio.client import Client


async def reset(client: Client, workflow_id: str, epoch: int) -> str:
    """Reset the run to the first workflow task after the report of that epoch; gives the new execution's run id."""
    history = await client.get_workflow_handle(workflow_id).fetch_history()
    ordered: dict[int, int] = {}
    past = False
    point = 0
    for event in history.events:
        if event.HasField("activity_task_scheduled_event_attributes"):
            scheduled = event.activity_task_scheduled_event_attributes
            if scheduled.activity_type.name == "train_epoch":
                ordered[event.event_id] = json.loads(scheduled.input.payloads[0].data)["epoch"]
        elif event.HasField("activity_task_completed_event_attributes"):
            completed = event.activity_task_completed_event_attributes
            past = past or ordered.get(completed.scheduled_event_id) == epoch
        elif past and event.HasField("workflow_task_completed_event_attributes"):
            point = event.event_id
            break
    assert point, f"no workflow task after epoch {epoch}"
    answer = await client.workflow_service.reset_workflow_execution(
        ResetWorkflowExecutionRequest(
            namespace=client.namespace,
            workflow_execution=WorkflowExecution(workflow_id=workflow_id, run_id=history.run_id),
            reason="a person looks back",
            workflow_task_finish_event_id=point,
            request_id=uuid.uuid4().hex,
        )
    )
    return answer.run_id
