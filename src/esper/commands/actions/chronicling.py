"""The workflow side of `history`: what the executions of a run tell, from Urza and from the server together."""

import asyncio
import json
from dataclasses import asdict
from typing import Any

from temporalio.client import Client
from temporalio.service import RPCError

from esper.commands.actions import connections
from esper.commands.actions import records
from esper.contracts.orders import RunRecord
from esper.errors import TemporalUnavailable
from esper.runtime.run_document import ENDED
from esper.runtime.temporal.chronicle import chronicle
from esper.runtime.temporal.executions import executions
from esper.runtime.urza.library import Library


async def workflow_document(run_id: str) -> dict[str, Any]:
    """`executions` (Temporal run ids, oldest first), `events`, and `missing`: why something may be left out.

    The histories of closed executions are in Urza; the server is asked for the rest, and for all of a run that has
    not ended. Raises `NotFoundError` (ESP-505), `IntegrityError` for a damaged history.
    """
    async with connections.library() as library:
        known = records.require(library, run_id)
        record = await known.run(run_id)
        stored = await _stored(known, run_id)
    missing: str | None = None
    served: dict[str, dict[str, Any]] = {}
    if not stored or record.outcome not in ENDED:
        try:
            served = await _served(record)
        except (TemporalUnavailable, RPCError) as error:
            missing = f"the Temporal server could not be asked: {error}"
    found = stored | {temporal_run: history for temporal_run, history in served.items() if temporal_run not in stored}
    if not found and missing is None:
        missing = "neither Urza nor the Temporal server has a history of this run"
    return {
        "executions": list(found),
        "events": [asdict(happening) for happening in chronicle(list(found.values()))],
        "missing": missing,
    }


async def _stored(library: Library, run_id: str) -> dict[str, dict[str, Any]]:
    """The run's own executions in Urza, by Temporal run id, oldest first."""
    store = connections.store()
    own = [history for history in await library.histories(run_id) if history.workflow_id == run_id]
    found = {}
    for history in sorted(own, key=lambda each: each.sequence):
        found[history.temporal_run_id] = json.loads(await asyncio.to_thread(store.get, history.events))
    return found


async def _served(record: RunRecord) -> dict[str, dict[str, Any]]:
    client: Client = await connections.client(record.config.temporal)
    return {temporal_run: history.to_json_dict() for temporal_run, history in await executions(client, record.run_id)}
