"""Keeps the Temporal history of every closed run in Urza, so that nothing depends on the server's retention."""

import asyncio
import json
import logging
from datetime import UTC
from datetime import datetime

from temporalio.client import Client
from temporalio.client import WorkflowExecutionStatus
from temporalio.service import RPCError
from temporalio.service import RPCStatusCode

from esper.contracts.config import UrzaConfig
from esper.contracts.enums import Outcome
from esper.contracts.orders import RunRecord
from esper.runtime.urza.connections import Connections

log = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
_ENDED = (Outcome.COMPLETED, Outcome.STOPPED, Outcome.FAILED)


class Historian:
    """Looks for ended runs whose histories are not stored yet, and stores them: the run's own (each part of a
    continue-as-new chain) and those of its decisions and kernels."""

    def __init__(self, client: Client, connections: Connections) -> None:
        self._client = client
        self._connections = connections
        self._done: set[tuple[str, int]] = set()

    async def keep(self) -> None:
        """Until cancelled. A failure is logged and tried again: it must never end a worker."""
        while True:
            try:
                await self.look()
            except Exception:
                log.exception("the histories of ended runs could not be stored; trying again")
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self) -> None:
        """Store what can be stored now."""
        for urza in self._connections.known():
            library = await self._connections.library(urza)
            for record in await library.runs():
                mark = (record.run_id, record.lease_gen)
                if record.outcome in _ENDED and mark not in self._done and await self._store(record, urza):
                    self._done.add(mark)

    async def _store(self, record: RunRecord, urza: UrzaConfig) -> bool:
        library = await self._connections.library(urza)
        known = {(history.workflow_id, history.temporal_run_id) for history in await library.histories(record.run_id)}
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
        for workflow_id in workflow_ids:
            for sequence, (temporal_run_id, document) in enumerate(await self._chain(workflow_id)):
                if (workflow_id, temporal_run_id) in known:
                    continue
                data = json.dumps(document, separators=(",", ":")).encode()
                ref = await asyncio.to_thread(self._connections.store(urza).put, data)
                await library.store_history(
                    record.run_id,
                    workflow_id,
                    temporal_run_id,
                    ref,
                    sequence,
                )
        log.info("stored the histories of run %s at %s", record.run_id, datetime.now(UTC).isoformat())
        return True

    async def _chain(self, workflow_id: str) -> list[tuple[str, dict[str, object]]]:
        """The histories of one workflow id, oldest first, along its continue-as-new chain."""
        found: list[tuple[str, dict[str, object]]] = []
        run_id: str | None = None
        while True:
            handle = self._client.get_workflow_handle(workflow_id, run_id=run_id)
            try:
                history = await handle.fetch_history()
            except RPCError as error:
                if error.status is RPCStatusCode.NOT_FOUND:
                    return found
                raise
            started = history.events[0].workflow_execution_started_event_attributes
            found.insert(0, (started.original_execution_run_id, history.to_json_dict()))
            if not started.continued_execution_run_id:
                return found
            run_id = started.continued_execution_run_id
