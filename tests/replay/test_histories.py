"""The histories of earlier runs lead the present code down the same path; other code is found out."""

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import pytest
from history_scenes import SCENES
from other_workflows import BackwardDecision
from other_workflows import DicingRun
from other_workflows import HastyDecision
from other_workflows import OtherForge
from other_workflows import RestlessRun
from workflow_stage import WORKFLOWS

from esper.runtime.temporal.replay import ReplayReport
from esper.runtime.temporal.replay import replay_history
from esper.workflows.tezzeret_compile import TezzeretCompile

FOLDER = Path(__file__).parent / "histories"
HISTORIES = sorted(FOLDER.glob("*.json"))
REMAKE = "a run under way would break: use workflow.patched, or make the histories anew (make_histories.py)"


def replay(document: dict[str, Any], workflows: list[type]) -> ReplayReport:
    return asyncio.run(replay_history(document, workflows))


def load(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


@pytest.mark.fault("H1")
def test_there_is_a_history_of_every_workflow_and_scene() -> None:
    kinds = {
        load(path)["events"][0]["workflowExecutionStartedEventAttributes"]["workflowType"]["name"] for path in HISTORIES
    }
    assert kinds == {"TrainingRun", "TamiyoDecision", "TezzeretCompile"}
    assert {path.name.split(".")[0] for path in HISTORIES} == set(SCENES)


def recorded_states(name: str) -> list[str]:
    """What Urza was told of the adaptations in a scene, in order."""
    told = []
    for path in sorted(FOLDER.glob(f"{name}.run-*.json")):
        for event in load(path)["events"]:
            scheduled = event.get("activityTaskScheduledEventAttributes", {})
            if scheduled.get("activityType", {}).get("name") == "record_adaptation":
                told.append(json.loads(base64.b64decode(scheduled["input"]["payloads"][0]["data"])))
    return [request["adaptation"]["state"] for request in told]


@pytest.mark.fault("H1")
@pytest.mark.parametrize(
    ("scene", "ending"),
    [
        ("grow_and_keep", ["fossilized"]),
        ("grow_and_cull", ["culled"]),
        ("long_run", ["fossilized"]),
        ("kill_and_resume", ["fossilized"]),
        ("quarantine", ["failed"]),
        ("pause_and_veto", ["vetoed"]),
        ("forge_down", ["failed"]),
        ("reset", ["fossilized"]),
        ("wait_only", []),
        ("strategist_down", []),
        ("strategist_ended", []),
    ],
)
def test_a_scene_is_what_its_name_says(scene: str, ending: list[str]) -> None:
    assert recorded_states(scene)[-1:] == ending


@pytest.mark.fault("H1")
@pytest.mark.parametrize("path", HISTORIES, ids=lambda path: path.stem)
def test_a_history_replays(path: Path) -> None:
    report = replay(load(path), WORKFLOWS)
    assert report.clean, f"{report.message} ({REMAKE})"
    assert report.events == len(load(path)["events"])


@pytest.mark.fault("H5")
@pytest.mark.parametrize(
    ("part", "other", "recorded", "ordered"),
    [
        ("tamiyo-1-0", HastyDecision, "activity score_sites", "nothing more"),
        ("tamiyo-1-0", BackwardDecision, "activity score_sites", "activity record_decision"),
        ("tezzeret-a1-0", OtherForge, "activity build_kernel", "activity build_anything"),
        ("run-0", DicingRun, "child workflow run-", "child workflow run-"),
    ],
)
def test_code_that_does_otherwise_is_found_out_by_event_and_by_both_orders(
    part: str, other: type, recorded: str, ordered: str
) -> None:
    """Nothing asked for, asked in another order, something else asked for, named at random."""
    document = load(FOLDER / f"grow_and_keep.{part}.json")
    report = replay(document, [other])
    assert not report.clean and report.message
    assert report.recorded is not None and report.recorded.startswith(recorded)
    assert report.ordered is not None and report.ordered.startswith(ordered)
    assert report.recorded != report.ordered
    assert report.event_id is not None
    differing = document["events"][report.event_id - 1]
    assert int(differing["eventId"]) == report.event_id


@pytest.mark.fault("H5")
def test_code_that_does_one_more_thing_is_found_out() -> None:
    report = replay(load(FOLDER / "grow_and_keep.run-0.json"), [RestlessRun, HastyDecision, TezzeretCompile])
    assert not report.clean
    assert report.event_id == 5
