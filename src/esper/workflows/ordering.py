"""How workflows order activities: typed by name, with the options of the one table."""

from datetime import timedelta
from typing import TypeVar

from temporalio import workflow

from esper.activities.names import ActivityName
from esper.runtime.temporal.options import OPTIONS
from esper.workflows.presentation import clipped

ArgumentT = TypeVar("ArgumentT")
ResultT = TypeVar("ResultT")


async def order(
    activity: ActivityName[ArgumentT, ResultT],
    argument: ArgumentT,
    *,
    task_queue: str,
    summary: str,
    options: str | None = None,
    limit: timedelta | None = None,
    deadline: timedelta | None = None,
    silence: timedelta | None = None,
) -> ResultT:
    """Run one activity and return its result.

    `options` names another row of the table than the activity's own; `limit` bounds one attempt, `deadline`
    waiting, running and retrying together, `silence` the time between two heartbeats.
    """
    keywords = OPTIONS[options or activity.name].keywords()
    if limit is not None:
        keywords["start_to_close_timeout"] = limit
    if deadline is not None:
        keywords["schedule_to_close_timeout"] = deadline
    if silence is not None:
        keywords["heartbeat_timeout"] = silence
    result: ResultT = await workflow.execute_activity(
        activity.name,
        argument,
        task_queue=task_queue,
        result_type=activity.result,
        summary=clipped(summary),
        **keywords,
    )
    return result
