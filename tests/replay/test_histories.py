"""The histories of earlier runs lead the present code down the same path; other code is found out."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from other_workflows import HastyDecision
from other_workflows import RestlessRun
from workflow_stage import WORKFLOWS

from esper.runtime.temporal.replay import ReplayReport
from esper.runtime.temporal.replay import replay_history
from esper.workflows.tezzeret_compile import TezzeretCompile
from esper.workflows.training_run import TrainingRun

HISTORIES = sorted((Path(__file__).parent / "histories").glob("*.json"))
REMAKE = "a run under way would break: use workflow.patched, or make the histories anew (make_histories.py)"


def replay(document: dict[str, Any], workflows: list[type]) -> ReplayReport:
    return asyncio.run(replay_history(document, workflows))


def load(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def test_there_is_a_history_of_every_workflow_and_scene() -> None:
    kinds = {
        load(path)["events"][0]["workflowExecutionStartedEventAttributes"]["workflowType"]["name"] for path in HISTORIES
    }
    assert kinds == {"TrainingRun", "TamiyoDecision", "TezzeretCompile"}
    assert {path.name.split(".")[0] for path in HISTORIES} == {"grow_and_keep", "long_run", "lose_pause_and_stop"}


@pytest.mark.parametrize("path", HISTORIES, ids=lambda path: path.stem)
def test_a_history_replays(path: Path) -> None:
    report = replay(load(path), WORKFLOWS)
    assert report.clean, f"{report.message} ({REMAKE})"
    assert report.events == len(load(path)["events"])


def test_code_that_decides_otherwise_is_found_out() -> None:
    path = next(path for path in HISTORIES if "tamiyo" in path.name)
    report = replay(load(path), [TrainingRun, HastyDecision, TezzeretCompile])
    assert not report.clean
    assert report.event_id is not None


def test_code_that_does_one_more_thing_is_found_out() -> None:
    path = next(path for path in HISTORIES if path.name == "grow_and_keep.run-0.json")
    report = replay(load(path), [RestlessRun, HastyDecision, TezzeretCompile])
    assert not report.clean
    assert report.event_id == 5
