"""`replay` on real histories from a real server."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_activities import FakeWorld
from recorded_run import RecordedRun
from workflow_stage import configuration
from workflow_stage import stage

pytestmark = pytest.mark.temporal

Cli = Callable[..., Any]
Record = Callable[..., Any]
Histories = dict[str, str]


@pytest.fixture(scope="module")
def histories(temporal_address: str) -> Histories:
    """The histories of a run that grew, and of its children, by workflow id; the run's own is the shortest id."""

    async def main() -> Histories:
        async with stage(temporal_address, FakeWorld(grow_at=2, epoch_seconds=0.05)) as on:
            handle = await on.start(configuration(4))
            await handle.result()
            ids = [
                handle.id,
                *(f"{handle.id}/tamiyo/{epoch}" for epoch in (1, 2, 3)),
                f"{handle.id}/tezzeret/{handle.id}/a1",
            ]
            listed: Histories = {}
            query = f'WorkflowId = "{handle.id}" OR WorkflowId STARTS_WITH "{handle.id}/"'
            async with asyncio.timeout(30):
                # Visibility is a little behind the end of the run.
                while len(listed) < len(ids):
                    async for execution in on.client.list_workflows(query):
                        one = on.client.get_workflow_handle(execution.id, run_id=execution.run_id)
                        listed[execution.id] = (await one.fetch_history()).to_json()
                    await asyncio.sleep(0.1)
            return listed

    return asyncio.run(main())


def run_of(histories: Histories) -> str:
    return min(histories, key=len)


def other_activity(history: str) -> str:
    """The history of a run whose first activity had another name."""
    document = json.loads(history)
    for event in document["events"]:
        scheduled = event.get("activityTaskScheduledEventAttributes")
        if scheduled is not None:
            scheduled["activityType"]["name"] = "another_activity"
            return json.dumps(document)
    raise AssertionError("no activity in the history")


def test_every_history_of_a_run_replays_clean_from_its_file(cli: Cli, histories: Histories, folder: Path) -> None:
    kinds = set()
    for workflow_id, history in histories.items():
        (folder / "history.json").write_text(history)
        result = cli("replay", "history.json", "--json")
        assert result.code == 0, result.err
        report = result.json[0]
        assert (report["workflow_id"], report["clean"], report["event_id"]) == (workflow_id, True, None)
        kinds.add(report["workflow_type"])
    assert kinds == {"TrainingRun", "TamiyoDecision", "TezzeretCompile"}


@pytest.mark.fault("H5")
def test_a_divergence_is_named_by_its_event(cli: Cli, histories: Histories, folder: Path) -> None:
    (folder / "history.json").write_text(other_activity(histories[run_of(histories)]))
    result = cli("replay", "history.json", "--json")
    assert (result.code, result.error["code"]) == (4, "ESP-409")
    assert result.json[0]["clean"] is False
    assert result.json[0]["event_id"] == 5
    assert "another_activity" in result.json[0]["message"]
    assert "diverges at event 5" in cli("replay", "history.json").out


@pytest.mark.parametrize(
    "content", ["not json", "[]", '{"events": []}', '{"events": [{"eventId": "1"}]}', "[" * 100_000]
)
def test_what_is_no_history_is_exit_4(cli: Cli, folder: Path, content: str) -> None:
    (folder / "history.json").write_text(content)
    result = cli("replay", "history.json", "--json")
    assert (result.code, result.error["code"]) == (4, "ESP-408")


def test_a_missing_file_is_a_usage_error(cli: Cli) -> None:
    assert cli("replay", "missing.json", "--json").error["code"] == "ESP-201"


@pytest.mark.fault("H1")
def test_a_run_replays_from_urza_without_a_server(cli: Cli, record: Record, histories: Histories) -> None:
    async def scene(run: RecordedRun) -> None:
        await run.begin()
        for number, (workflow_id, history) in enumerate(sorted(histories.items())):
            place = run.store.put(history.encode())
            await run.library.store_history(run.run_id, workflow_id, f"execution-{number}", place, number)

    record(scene)
    result = cli("replay", "digits-1", "--json")
    assert result.code == 0
    assert [report["workflow_id"] for report in result.json] == sorted(histories)
    assert cli("replay", "digits-1").out.count("  clean\n") == len(histories)


def test_a_run_replays_from_the_server_while_urza_has_no_history(
    cli: Cli, record: Record, histories: Histories, temporal_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(run: RecordedRun) -> None:
        await run.begin()

    record(scene, run_of(histories))
    monkeypatch.setenv("TEMPORAL_ADDRESS", temporal_address)
    result = cli("replay", run_of(histories), "--json")
    assert result.code == 0, result.err
    assert {report["workflow_id"] for report in result.json} == set(histories)


def test_a_run_that_has_no_history_anywhere_is_exit_6(
    cli: Cli, record: Record, temporal_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(run: RecordedRun) -> None:
        await run.begin()

    record(scene)
    monkeypatch.setenv("TEMPORAL_ADDRESS", temporal_address)
    result = cli("replay", "digits-1", "--json")
    assert (result.code, result.error["code"]) == (6, "ESP-505")
