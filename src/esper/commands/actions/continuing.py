"""What goes on with a run that exists: its updates, `resume`, and `recover` when the server has forgotten it."""

import asyncio

from temporalio.client import Client
from temporalio.common import WorkflowIDReusePolicy

from esper.commands.actions import connections
from esper.commands.actions import records
from esper.commands.actions.launch import ROW_INTERVAL
from esper.commands.actions.launch import ROW_TIMEOUT
from esper.commands.actions.launch import code_location
from esper.commands.actions.launch import ensure_stack
from esper.commands.actions.launch import start_workflow
from esper.contracts.enums import Outcome
from esper.contracts.messages import Answer
from esper.contracts.messages import Payload
from esper.contracts.messages import Resume
from esper.contracts.orders import RunRecord
from esper.contracts.orders import TrainingRequest
from esper.errors import RunConflict
from esper.runtime.run_document import ENDED
from esper.runtime.urza.library import Library


def resume(run_id: str) -> dict[str, object]:
    """Continue a paused run by its update, an ended one by a new execution from its head.

    Raises `NotFoundError` (ESP-505), `RunConflict` (ESP-502 completed, ESP-504 neither paused nor ended).
    """
    record = asyncio.run(records.one_record(run_id))
    _refuse_completed(record, "resume")
    ensure_stack(record.config, quiet=False)
    return asyncio.run(_resume(record))


async def _resume(record: RunRecord) -> dict[str, object]:
    run_id = record.run_id
    client = await connections.client(record.config.temporal)
    if record.outcome not in ENDED and not await connections.is_closed(client, run_id):
        return await connections.execute_update(client, run_id, "resume", Resume())
    return await _begin_again(client, record)


async def update(run_id: str, name: str, payload: Payload) -> dict[str, object]:
    """Send one update to a running run and return its answer. Raises `RunConflict` (ESP-504), `NotFoundError`."""
    record = await records.one_record(run_id)
    client = await connections.client(record.config.temporal)
    if record.outcome in ENDED or await connections.is_closed(client, run_id):
        raise RunConflict(
            "ESP-504",
            f"run {run_id} has ended ({record.outcome.value}): {name} changes nothing",
            hint=f"`esper-cli resume {run_id}` continues it" if record.outcome is not Outcome.COMPLETED else None,
            run_id=run_id,
        )
    return await connections.execute_update(client, run_id, name, payload)


def recover(run_id: str) -> dict[str, object]:
    """Start a workflow for a run that the Temporal server no longer knows, from Urza's head and under a new lease.

    A trainer that the lost server left behind is fenced by that lease at its next write. Raises `NotFoundError`
    (ESP-505), `RunConflict` (ESP-502 completed, ESP-504 the server knows the run).
    """
    record = asyncio.run(records.one_record(run_id))
    _refuse_completed(record, "recover")
    ensure_stack(record.config, quiet=False)
    return asyncio.run(_recover(record))


async def _recover(record: RunRecord) -> dict[str, object]:
    client = await connections.client(record.config.temporal)
    if await connections.is_known(client, record.run_id):
        raise RunConflict(
            "ESP-504",
            f"the server at {connections.address_of(client)} knows run {record.run_id}: there is nothing to recover",
            hint=f"`esper-cli resume {record.run_id}` continues a paused, stopped or failed run",
            run_id=record.run_id,
        )
    return await _begin_again(client, record)


async def _begin_again(client: Client, record: RunRecord) -> dict[str, object]:
    """A new execution under the same id, which must find the head that Urza names now."""
    request = TrainingRequest(
        run_id=record.run_id,
        config=record.config,
        code=code_location(),
        expected_head=record.head.digest if record.head is not None else None,
    )
    await start_workflow(client, request, WorkflowIDReusePolicy.ALLOW_DUPLICATE, record.lineage)
    if record.outcome in ENDED:
        async with connections.opened_library(record.config.urza) as library:
            await _until_running(client, library, record.run_id)
    answer = Answer(
        run_id=record.run_id, message=f"{record.run_id} goes on from epoch {record.epochs}, step {record.steps}"
    )
    return answer.model_dump(mode="json")


def _refuse_completed(record: RunRecord, verb: str) -> None:
    if record.outcome is Outcome.COMPLETED:
        raise RunConflict(
            "ESP-502",
            f"run {record.run_id} has completed: nothing is left to {verb}",
            hint="Start another run with a larger run.max_epochs",
            run_id=record.run_id,
        )


async def _until_running(client: Client, library: Library, run_id: str) -> None:
    """Until the resumed run is recorded as running: `watch` would else show the end of the former execution."""
    deadline = asyncio.get_running_loop().time() + ROW_TIMEOUT
    while (await library.run(run_id)).outcome in ENDED and asyncio.get_running_loop().time() < deadline:
        if await connections.is_closed(client, run_id):
            return
        await asyncio.sleep(ROW_INTERVAL)
