"""Keeps the Temporal history of every closed run in Urza, so that nothing depends on the server's retention."""

import asyncio
import json
import logging

from temporalio.client import Client
from temporalio.client import WorkflowExecutionStatus
from temporalio.client import WorkflowHistory
from temporalio.service import RPCError
from temporalio.service import RPCStatusCode

from esper.contracts.config import UrzaConfig
from esper.contracts.enums import Outcome
from esper.contracts.orders import RunRecord
from esper.errors import EsperError
from esper.runtime.temporal.executions import executions
from esper.runtime.urza.connections import Connections

log = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
RECENT_RUNS = 100
"""Looked at every time; all of them the first time and then every `ALL_EVERY` looks."""
ALL_RUNS = 10_000
ALL_EVERY = 300
_ENDED = (Outcome.COMPLETED, Outcome.STOPPED, Outcome.FAILED)
_CLOSED = frozenset(
    f"workflow_execution_{ending}_event_attributes"
    for ending in ("completed", "failed", "timed_out", "canceled", "terminated", "continued_as_new")
)


class Historian:
    """Looks for ended runs whose histories are not stored yet, and stores them: the run's own (each part of a
    continue-as-new chain, and what it was reset from) and those of its decisions and kernels."""

    def __init__(self, client: Client, connections: Connections) -> None:
        self._client = client
        self._connections = connections
        self._done: set[tuple[str, int]] = set()
        self._looks = 0

    async def keep(self) -> None:
        """Until cancelled. A failure is logged and tried again: it must never end a worker."""
        while True:
            try:
                await self.look()
            except Exception:
                log.exception("the ended runs could not be listed; trying again")
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self) -> None:
        """Store what can be stored now. What fails for one run is tried again, and does not hold up the others."""
        limit = ALL_RUNS if self._looks % ALL_EVERY == 0 else RECENT_RUNS
        self._looks += 1
        for urza in self._connections.known():
            library = await self._connections.library(urza)
            for record in await library.runs(limit):
                mark = (record.run_id, record.lease_gen)
                if record.outcome not in _ENDED or mark in self._done:
                    continue
                try:
                    if await self._store(record, urza):
                        self._done.add(mark)
                except (RPCError, EsperError):
                    log.exception("the histories of run %s could not be stored; trying again", record.run_id)

    async def _store(self, record: RunRecord, urza: UrzaConfig) -> bool:
        """True when every execution that belongs to the run is closed and stored."""
        library = await self._connections.library(urza)
        stored: dict[str, dict[str, int]] = {}
        for kept in await library.histories(record.run_id):
            stored.setdefault(kept.workflow_id, {})[kept.temporal_run_id] = kept.sequence
        handle = self._client.get_workflow_handle(record.run_id)
        try:
            if (await handle.describe()).status is WorkflowExecutionStatus.RUNNING:
                return False
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                # Retention or a new server: what is not stored by now cannot be had any more.
                return True
            raise
        workflow_ids = [record.run_id]
        workflow_ids += [f"{record.run_id}/tamiyo/{d.epoch}" for d in await library.decisions(record.run_id)]
        workflow_ids += [f"{record.run_id}/tezzeret/a{a.number}" for a in await library.adaptations(record.run_id)]
        complete = True
        for workflow_id in workflow_ids:
            known = stored.get(workflow_id, {})
            sequence = max(known.values(), default=-1)
            for temporal_run_id, history in await executions(self._client, workflow_id):
                if temporal_run_id in known:
                    continue
                if history.events[-1].WhichOneof("attributes") not in _CLOSED:
                    # A forge outlives its run for a while.
                    complete = False
                    continue
                sequence += 1
                data = await asyncio.to_thread(_bytes, history)
                ref = await asyncio.to_thread(self._connections.store(urza).put, data)
                await library.store_history(record.run_id, workflow_id, temporal_run_id, ref, sequence)
        if complete:
            log.info("stored the histories of run %s", record.run_id)
        return complete


def _bytes(history: WorkflowHistory) -> bytes:
    return json.dumps(history.to_json_dict(), separators=(",", ":")).encode()
