"""The historian: every closed run's histories come into a real Urza, whole, and once."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from fake_activities import FakeWorld
from ledger_world import LedgerWorld
from resetting import reset
from temporalio.client import Client
from workflow_stage import WORKFLOWS
from workflow_stage import Stage
from workflow_stage import configuration
from workflow_stage import stage

from esper.contracts.config import UrzaConfig
from esper.contracts.enums import Outcome
from esper.contracts.orders import RecordOutcome
from esper.contracts.orders import RecordRun
from esper.contracts.orders import RunRecord
from esper.errors import DatabaseUnavailable
from esper.runtime.temporal.historian import Historian
from esper.runtime.temporal.replay import replay_history
from esper.runtime.urza import migration
from esper.runtime.urza.connections import Connections
from esper.runtime.urza.library import Library

pytestmark = pytest.mark.temporal


async def connections_in(folder: Path) -> tuple[Connections, Library]:
    await migration.upgrade("default", default_file=folder / "urza.db")
    connections = Connections(folder)
    return connections, await connections.library(UrzaConfig())


async def recorded(library: Library, world: FakeWorld, run_id: str, outcome: Outcome | None) -> None:
    """What the real activities would have entered."""
    await library.record_run(RecordRun(run_id=run_id, config=configuration(1)), "2030-01-01T00:00:00+00:00")
    for decision in world.decisions:
        await library.record_decision(decision)
    for adaptation in world.adaptations:
        await library.record_adaptation(adaptation)
    if outcome is not None:
        await library.finish(RecordOutcome(run_id=run_id, urza=UrzaConfig(), outcome=outcome))


def test_the_histories_of_a_run_are_stored_whole_in_order_and_once(temporal_address: str, tmp_path: Path) -> None:
    world = FakeWorld(grow_at=1)

    async def scene() -> tuple[str, list[Any], list[dict[str, Any]]]:
        connections, library = await connections_in(tmp_path)
        historian = Historian(await Client.connect(temporal_address), connections)
        async with stage(temporal_address, world) as on:
            handle = await on.start(configuration(4), continue_after_epochs=2)
            await handle.result()
        await recorded(library, world, handle.id, None)
        await historian.look()
        assert await library.histories(handle.id) == (), "a run that goes on has no end to its history"
        await library.finish(RecordOutcome(run_id=handle.id, urza=UrzaConfig(), outcome=Outcome.COMPLETED))
        await historian.look()
        stored = await library.histories(handle.id)
        again = Historian(await Client.connect(temporal_address), connections)
        await again.look()
        assert await library.histories(handle.id) == stored
        store = connections.store(UrzaConfig())
        documents = [json.loads(store.get(history.events)) for history in stored]
        for document in documents:
            assert (await replay_history(document, WORKFLOWS)).clean
        await connections.close()
        return handle.id, list(stored), documents

    run_id, stored, documents = asyncio.run(scene())
    own = [
        (history.sequence, document)
        for history, document in zip(stored, documents, strict=True)
        if history.workflow_id == run_id
    ]
    assert [sequence for sequence, _ in own] == list(range(len(own)))
    assert len(own) >= 2
    firsts = [document["events"][0]["workflowExecutionStartedEventAttributes"] for _, document in own]
    assert [first.get("continuedExecutionRunId") for first in firsts[1:]] == [
        history.temporal_run_id for history in stored if history.workflow_id == run_id
    ][:-1]
    children = {history.workflow_id for history in stored} - {run_id}
    assert children == {f"{run_id}/tamiyo/{epoch}" for epoch in (1, 2, 3)} | {f"{run_id}/tezzeret/a1"}


@pytest.mark.fault("C8")
def test_a_reset_run_is_stored_beside_what_it_was_reset_from(temporal_address: str, tmp_path: Path) -> None:
    world = LedgerWorld()

    async def scene() -> list[tuple[str, int, bool]]:
        connections, library = await connections_in(tmp_path)
        async with stage(temporal_address, world) as on:
            handle = await on.start(configuration(3))
            await handle.result()
            await recorded(library, world, handle.id, Outcome.STOPPED)
            await Historian(on.client, connections).look()
            (first, *_) = await library.histories(handle.id)
            run_id = await reset(on.client, handle.id, 2)
            await on.client.get_workflow_handle(handle.id, run_id=run_id).result()
            await Historian(on.client, connections).look()
        own = [history for history in await library.histories(handle.id) if history.workflow_id == handle.id]
        await connections.close()
        assert first.temporal_run_id == own[0].temporal_run_id
        return [(history.temporal_run_id, history.sequence, history.temporal_run_id == run_id) for history in own]

    stored = asyncio.run(scene())
    assert [(sequence, is_reset) for _, sequence, is_reset in stored] == [(0, False), (1, True)]


def test_a_run_that_the_server_forgot_does_not_hold_up_the_others(
    temporal_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> tuple[int, int]:
        connections, library = await connections_in(tmp_path)
        historian = Historian(await Client.connect(temporal_address), connections)
        await recorded(library, FakeWorld(), "forgotten", Outcome.COMPLETED)
        async with stage(temporal_address, FakeWorld()) as on:
            run_id = await _run(on)
        await recorded(library, FakeWorld(), run_id, Outcome.COMPLETED)
        await recorded(library, FakeWorld(), "broken", Outcome.COMPLETED)
        real = historian._store

        async def store(record: RunRecord, urza: UrzaConfig) -> bool:
            if record.run_id == "broken":
                raise DatabaseUnavailable("ESP-333", "locked")
            return await real(record, urza)

        monkeypatch.setattr(historian, "_store", store)
        with caplog.at_level(logging.CRITICAL):
            await historian.look()
        found = len(await library.histories(run_id)), len(historian._done)
        await connections.close()
        return found

    async def _run(on: Stage) -> str:
        handle = await on.start(configuration(1, tamiyo={"policy": "none"}))
        await handle.result()
        return handle.id

    assert asyncio.run(scene()) == (1, 2)


def test_keeping_goes_on_after_a_failure_and_ends_when_cancelled(
    temporal_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looks = 0

    async def look(self: Historian) -> None:
        nonlocal looks
        looks += 1
        raise RuntimeError("no disk")

    monkeypatch.setattr(Historian, "look", look)
    monkeypatch.setattr("esper.runtime.temporal.historian.LOOK_EVERY_S", 0.01)

    async def scene() -> None:
        historian = Historian(await Client.connect(temporal_address), Connections(tmp_path))
        keeping = asyncio.create_task(historian.keep())
        while looks < 3:
            await asyncio.sleep(0.01)
        keeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await keeping

    with caplog.at_level(logging.CRITICAL):
        asyncio.run(scene())
