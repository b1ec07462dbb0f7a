"""`history`: the decisions of Urza and what the workflow's executions tell, also where the server is gone."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from busy_world import BusyWorld
from recorded_run import RecordedRun
from workflow_stage import configuration
from workflow_stage import stage

Cli = Callable[..., Any]
Record = Callable[..., Any]

HISTORIES = Path(__file__).parent.parent / "replay" / "histories"


async def of_three_parts(run: RecordedRun) -> None:
    """A completed run whose workflow continued as new twice, all of it stored."""
    await run.whole()
    for part in range(3):
        place = run.store.put((HISTORIES / f"long_run.run-{part}.json").read_bytes())
        await run.library.store_history(run.run_id, run.run_id, f"execution-{part}", place, part)


def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPORAL_ADDRESS", "127.0.0.1:1")


def test_a_closed_run_of_three_parts_is_told_without_a_server(
    cli: Cli, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(of_three_parts)
    nowhere(monkeypatch)
    result = cli("history", "digits-1", "--json")
    assert (result.code, result.err) == (0, "")
    assert [decision["epoch"] for decision in result.json["decisions"]] == [1, 2, 3, 4]
    workflow = result.json["workflow"]
    assert workflow["executions"] == ["execution-0", "execution-1", "execution-2"]
    assert workflow["missing"] is None
    executions = [event["text"] for event in workflow["events"] if event["kind"] == "execution"]
    assert executions == ["begins", "continued as new", "continues", "continued as new", "continues", "completed"]
    text = cli("history", "digits-1").out
    assert text.count("continued as new") == 2 and "lease 1 on" in text and "bottleneck" in text


def test_where_the_server_is_gone_the_decisions_are_told_and_what_is_missing(
    cli: Cli, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def begun(run: RecordedRun) -> None:
        await run.begin()

    record(begun)
    nowhere(monkeypatch)
    result = cli("history", "digits-1", "--json")
    assert result.code == 0
    assert result.json["workflow"]["executions"] == []
    assert "could not be asked" in result.json["workflow"]["missing"]
    assert "could not be asked" in cli("history", "digits-1").err


@pytest.mark.temporal
def test_a_run_that_is_not_stored_yet_is_told_by_the_server(
    cli: Cli, record: Record, temporal_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> str:
        async with stage(temporal_address, BusyWorld(grafts_wanted=1)) as on:
            handle = await on.start(configuration(6), continue_after_epochs=2)
            await handle.result()
            return handle.id

    async def begun(run: RecordedRun) -> None:
        await run.begin()

    run_id = asyncio.run(scene())
    record(begun, run_id)
    monkeypatch.setenv("TEMPORAL_ADDRESS", temporal_address)
    workflow = cli("history", run_id, "--json").json["workflow"]
    assert workflow["missing"] is None
    assert len(workflow["executions"]) == 3
    assert [event["text"] for event in workflow["events"]].count("continued as new") == 2
