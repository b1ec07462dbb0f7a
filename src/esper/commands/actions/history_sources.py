"""Where the histories of all runs are: on the Temporal server, and as objects in the stores that runs were given."""

import asyncio
import json
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from temporalio.client import Client
from temporalio.service import RPCError
from temporalio.service import RPCStatusCode

from esper.commands.actions import connections
from esper.commands.actions.retold_runs import Remains
from esper.contracts.assets import ArtifactRef
from esper.contracts.config import UrzaConfig
from esper.errors import IntegrityError
from esper.errors import TemporalUnavailable
from esper.runtime.home import resolve_urza
from esper.runtime.temporal.retelling import CHILDREN
from esper.runtime.temporal.retelling import Execution
from esper.runtime.temporal.retelling import identify
from esper.runtime.temporal.retelling import is_history
from esper.runtime.temporal.retelling import parse_stored
from esper.runtime.temporal.retelling import training_request
from esper.runtime.temporal.workflow_types import TRAINING_RUN
from esper.runtime.urza.decisions import StoredHistory

Key = tuple[str, str]
"""Workflow id and Temporal's own run id: one execution."""

History = tuple[Execution, Mapping[str, Any]]

_BEGINNING_BYTES = 16
_ALL = " OR ".join(f"WorkflowType = '{name}'" for name in (TRAINING_RUN, *CHILDREN))


@dataclass
class _Store:
    """An object store and the histories that were found in it, by run and execution."""

    remains: Remains
    histories: dict[str, dict[Key, tuple[Execution, ArtifactRef]]] = field(default_factory=dict)

    def search(self) -> None:
        """Only objects that begin as a history does are read whole. Of two of one execution the longer one counts."""
        store = self.remains.store
        for ref in self.remains.references.values():
            try:
                if not is_history(store.peek(ref, _BEGINNING_BYTES)):
                    continue
                history = parse_stored(store.get(ref))
            except IntegrityError:
                # Gone or damaged: what it told is told by nobody, and the run says so.
                continue
            if history is None:
                continue
            execution = identify(history)
            of_run = self.histories.setdefault(execution.run_id, {})
            key = execution.workflow_id, execution.temporal_run_id
            if key not in of_run or of_run[key][0].order < execution.order:
                of_run[key] = execution, ref


class HistorySources:
    """Lists once what there is, and reads the histories of one run at a time."""

    def __init__(self, client: Client | None) -> None:
        self._client = client
        self._served: dict[str, list[Key]] = {}
        self._stores: dict[str, _Store] = {}

    async def open(self) -> None:
        """List what the server knows, and search the store of the environment.

        Raises `TemporalUnavailable` (ESP-301), `ObjectsUnavailable`.
        """
        if self._client is not None:
            try:
                async for found in self._client.list_workflows(_ALL):
                    self._served.setdefault(found.id.partition("/")[0], []).append((found.id, found.run_id))
            except RPCError as error:
                raise TemporalUnavailable("ESP-301", f"Temporal lists no workflows: {error.message}") from error
        await self._store(connections.settings().urza)

    def runs(self) -> Iterator[str]:
        """Every run that there is a history of. Reading one may lead to a store with more."""
        seen: set[str] = set()
        while waiting := {*self._served, *(run for each in self._stores.values() for run in each.histories)} - seen:
            for run_id in sorted(waiting):
                seen.add(run_id)
                yield run_id

    async def histories(self, run_id: str) -> list[History]:
        """Each execution with its history, the server's where both have one. Raises `IntegrityError` (ESP-408) when
        none is of the run's own workflow."""
        found: dict[Key, History] = {}
        for key in self._served.get(run_id, ()):
            history = await self._fetch(*key)
            if history is not None:
                found[key] = identify(history), history
                if found[key][0].workflow_type == TRAINING_RUN:
                    await self._store(training_request(history).config.urza)
        for store in self._stores.values():
            for key, (execution, ref) in store.histories.get(run_id, {}).items():
                if key not in found:
                    found[key] = execution, json.loads(await asyncio.to_thread(store.remains.store.get, ref))
        if not any(execution.workflow_type == TRAINING_RUN for execution, _ in found.values()):
            raise IntegrityError("ESP-408", f"run {run_id}: there are histories of its children only")
        return list(found.values())

    def remains(self, urza: UrzaConfig) -> Remains:
        """What the store of a run whose histories were read has left."""
        return self._stores[_location(urza)].remains

    def stored(self, run_id: str, urza: UrzaConfig) -> tuple[StoredHistory, ...]:
        """The closed executions of the run that lie in its store, numbered within each workflow as they followed."""
        found = self._stores[_location(urza)].histories.get(run_id, {}).values()
        numbers: dict[str, int] = {}
        kept = []
        for execution, ref in sorted((each for each in found if each[0].closed), key=lambda each: each[0].order):
            number = numbers.get(execution.workflow_id, 0)
            numbers[execution.workflow_id] = number + 1
            kept.append(StoredHistory(execution.workflow_id, execution.temporal_run_id, number, ref))
        return tuple(kept)

    async def _store(self, urza: UrzaConfig) -> None:
        location = _location(urza)
        if location not in self._stores:
            self._stores[location] = made = _Store(await asyncio.to_thread(Remains, connections.store(urza)))
            await asyncio.to_thread(made.search)

    async def _fetch(self, workflow_id: str, temporal_run_id: str) -> Mapping[str, Any] | None:
        """`None` when the server has forgotten it since."""
        assert self._client is not None
        try:
            handle = self._client.get_workflow_handle(workflow_id, run_id=temporal_run_id)
            document: Mapping[str, Any] = (await handle.fetch_history()).to_json_dict()
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                return None
            raise TemporalUnavailable("ESP-301", f"Temporal does not give {workflow_id}: {error.message}") from error
        return document


def _location(urza: UrzaConfig) -> str:
    return resolve_urza(urza, connections.home()).objects
