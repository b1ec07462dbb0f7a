"""What the stored histories of a run tell a person: its executions, trainers and messages."""

import asyncio
import json
from pathlib import Path

import pytest
from temporalio.client import Client

from esper.runtime.temporal.chronicle import Happening
from esper.runtime.temporal.chronicle import chronicle
from esper.runtime.temporal.executions import executions

HISTORIES = Path(__file__).parent.parent / "replay" / "histories"


def of(scene: str) -> tuple[Happening, ...]:
    return chronicle([json.loads(path.read_text()) for path in sorted(HISTORIES.glob(f"{scene}.run-*.json"))])


def texts(scene: str, kind: str) -> list[str]:
    return [happening.text for happening in of(scene) if happening.kind == kind]


def test_a_run_of_three_parts_is_told_as_one() -> None:
    assert texts("long_run", "execution") == [
        *("begins", "continued as new", "continues", "continued as new", "continues", "completed")
    ]
    assert [happening.execution for happening in of("long_run")] == sorted(
        happening.execution for happening in of("long_run")
    )
    times = [happening.time for happening in of("long_run")]
    assert times == sorted(times) and all(times)
    assert texts("long_run", "trainer") == ["lease 1 on esper-trainer@fake"]


def test_a_death_a_stop_and_a_second_life_are_told() -> None:
    trainers = texts("kill_and_resume", "trainer")
    assert trainers[0] == "lease 1 on esper-trainer@fake"
    assert "reported dead: killed" in trainers
    assert [text for text in trainers if text.startswith("lease")] == [
        f"lease {number} on esper-trainer@fake" for number in (1, 2, 3)
    ]
    assert texts("kill_and_resume", "message")[-1] == "stop by test"
    assert texts("kill_and_resume", "execution") == ["begins", "completed", "begins", "completed"]


def test_messages_are_told_with_who_sent_them_and_strange_ones_are_counted() -> None:
    asked = texts("pause_and_veto", "message")
    assert asked[:3] == ["veto by test", "pause by test", "resume by test"]
    strange = texts("strange_messages", "message")
    assert "kernel_ready (unreadable)" in strange
    assert "1 of no known kind (nobody_knows_this)" in strange
    assert any(text.startswith("kernel_ready run-") for text in strange)


def test_work_that_a_trainer_did_not_finish_is_told() -> None:
    assert "train_epoch failed: lost" in texts("lose_pause_and_stop", "trainer")


@pytest.mark.temporal
def test_an_unknown_workflow_has_no_executions(temporal_address: str) -> None:
    async def scene() -> int:
        return len(await executions(await Client.connect(temporal_address), "nobody"))

    assert asyncio.run(scene()) == 0
