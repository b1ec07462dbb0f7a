"""`replay`: every stored history of a run, or one file, on the workflows of the present code."""

import asyncio
from pathlib import Path
from typing import Any

from temporalio.client import Client

from esper.commands import output
from esper.commands.actions import connections
from esper.commands.actions import records
from esper.contracts.orders import RunRecord
from esper.errors import ConfigurationError
from esper.errors import DivergenceError
from esper.errors import IntegrityError
from esper.errors import NotFoundError
from esper.runtime.temporal.replay import ReplayReport
from esper.runtime.temporal.replay import replay_history
from esper.runtime.urza.library import Library
from esper.workflows.tamiyo_decision import TamiyoDecision
from esper.workflows.tezzeret_compile import TezzeretCompile
from esper.workflows.training_run import TrainingRun

WORKFLOWS = (TrainingRun, TamiyoDecision, TezzeretCompile)


async def replay(target: str) -> list[ReplayReport]:
    """Replay a file when there is one of that name, else the histories of the run of that id.

    Raises `NotFoundError` (ESP-505), `IntegrityError` (ESP-408) when a history cannot be read.
    """
    path = Path(target)
    if path.is_file():
        try:
            histories = [path.read_text(encoding="utf-8")]
        except (OSError, ValueError) as error:
            raise IntegrityError("ESP-408", f"the history {target!r} cannot be read: {error}") from error
    elif "/" in target or target.endswith(".json"):
        raise ConfigurationError("ESP-201", f"history {target!r}: no such file")
    else:
        histories = await run_histories(target)
    return [await replay_history(history, WORKFLOWS) for history in histories]


async def run_histories(run_id: str) -> list[str]:
    """Every stored history of a run and its children, as JSON. Raises `NotFoundError` (ESP-505)."""
    async with connections.library() as library:
        known = records.require(library, run_id)
        return await _histories(known, await known.run(run_id))


def write_reports(reports: list[ReplayReport], *, as_json: bool) -> int:
    """Print what was found; a divergence ends with its own error (exit 4)."""
    if as_json:
        output.write_json([_form(report) for report in reports])
    else:
        for report in reports:
            found = "clean" if report.clean else f"diverges at event {report.event_id or '?'}"
            output.write(f"{report.workflow_id}  {report.workflow_type}  {report.events} events  {found}")
            if report.recorded is not None:
                output.write(f"  the history has: {report.recorded}")
                output.write(f"  the code orders: {report.ordered}")
    first = next((report for report in reports if not report.clean), None)
    if first is not None:
        raise DivergenceError(
            "ESP-409",
            f"workflow {first.workflow_id} does not replay: {first.message}",
            hint="The code has changed since this history was written; replay it with the version that wrote it",
        )
    return 0


async def _histories(library: Library, record: RunRecord) -> list[str]:
    """From Urza where they are stored, else from the server: the run's own executions and its children's."""
    run_id = record.run_id
    stored = await library.histories(run_id)
    if stored:
        store = connections.store()
        ordered = sorted(stored, key=lambda history: _numbered(history.workflow_id))
        return [(await asyncio.to_thread(store.get, history.events)).decode() for history in ordered]
    client = await connections.client(record.config.temporal)
    fetched = await _fetch(client, run_id)
    if not fetched:
        raise NotFoundError(
            "ESP-505",
            f"run {run_id} has no stored history, and the server at {connections.address_of(client)} knows none",
            run_id=run_id,
        )
    return fetched


def _numbered(workflow_id: str) -> tuple[str, int]:
    """By parent and kind, then by the number of the epoch or the adaptation: 2 comes before 10."""
    name = workflow_id.rstrip("0123456789")
    return name, int(workflow_id[len(name) :] or 0)


async def _fetch(client: Client, run_id: str) -> list[str]:
    """All executions whose id is the run's or begins with `<run id>/`, oldest first."""
    query = f'WorkflowId = "{run_id}" OR WorkflowId STARTS_WITH "{run_id}/"'
    found = [execution async for execution in client.list_workflows(query)]
    found.sort(key=lambda execution: (execution.start_time, execution.id))
    histories = []
    for execution in found:
        handle = client.get_workflow_handle(execution.id, run_id=execution.run_id)
        histories.append((await handle.fetch_history()).to_json())
    return histories


def _form(report: ReplayReport) -> dict[str, Any]:
    return {
        "workflow_id": report.workflow_id,
        "workflow_type": report.workflow_type,
        "events": report.events,
        "clean": report.clean,
        "event_id": report.event_id,
        "message": report.message,
        "recorded": report.recorded,
        "ordered": report.ordered,
    }
