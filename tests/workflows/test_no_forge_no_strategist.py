"""The run workflow while the forge or the strategist is away or talks nonsense: no growth, said so, and training goes
on."""

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from fake_activities import FakeWorld
from faulty_world import FaultyWorld
from workflow_stage import Stage
from workflow_stage import configuration
from workflow_stage import stage

from esper.contracts.enums import AdaptationState
from esper.contracts.enums import DecisionKind
from esper.contracts.enums import Outcome
from esper.contracts.orders import RunRecord
from esper.runtime.temporal import queues

pytestmark = pytest.mark.temporal

Play = Callable[..., Any]


def whole_run(epochs: int) -> Callable[[Stage], Any]:
    async def scene(on: Stage) -> RunRecord:
        return await (await on.start(configuration(epochs))).result()

    return scene


@pytest.mark.fault("B5", "I8", "I10")
def test_while_the_forge_is_down_adaptations_expire_and_none_is_made_up_for_later(
    temporal_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esper.runtime.temporal.options.FORGE_MARGIN", timedelta(seconds=0.5))
    world = FakeWorld(grow_at=1, epoch_seconds=0.05)

    async def whole() -> RunRecord:
        async with stage(temporal_address, world, without=(queues.FORGE,)) as on:
            handle = await on.start(configuration(5, tezzeret={"timeout_s": 1.0}))
            record = await handle.result()
            # It comes back: what nobody waits for any more is not built.
            await on.serve(queues.FORGE)
            await asyncio.sleep(1)
            return record

    record = asyncio.run(whole())
    assert record.outcome is Outcome.COMPLETED
    assert [a.state for a in world.adaptations] == [AdaptationState.ORDERED, AdaptationState.FAILED]
    assert "build_kernel" in world.adaptations[-1].reason
    assert [what for what, _ in world.journal if what in ("build", "install")] == []
    assert [epoch for what, epoch in world.journal if what == "epoch"] == [1, 2, 3, 4, 5]


def waits(world: FakeWorld) -> list[tuple[int, str]]:
    assert all(decision.kind is DecisionKind.WAIT for decision in world.decisions)
    return [(decision.epoch, decision.code) for decision in world.decisions]


@pytest.mark.fault("B6", "I10")
def test_a_strategist_that_fails_is_a_recorded_wait(play: Play) -> None:
    world = FakeWorld(grow_at=1, score_fails=True)
    assert play(world, whole_run(3)).outcome is Outcome.COMPLETED
    assert waits(world) == [(1, "failed"), (2, "failed")]
    assert all("no strategist" in decision.reason for decision in world.decisions)
    assert world.adaptations == []


@pytest.mark.fault("B6", "I10")
@pytest.mark.parametrize(
    "garbage", [{"run_id": "r", "score": "NaN"}, "grow!", None, 7], ids=["other", "text", "nothing", "number"]
)
def test_an_answer_that_is_no_decision_is_a_recorded_wait(
    play: Play, monkeypatch: pytest.MonkeyPatch, garbage: object
) -> None:
    monkeypatch.setattr("esper.runtime.temporal.options.DECISION_LIMIT", timedelta(seconds=2))
    world = FaultyWorld(grow_at=1, alter={"score_sites": lambda decision: garbage})
    assert play(world, whole_run(2)).outcome is Outcome.COMPLETED
    assert waits(world) == [(1, "failed")]
    assert world.adaptations == []


@pytest.mark.fault("B6", "I10")
@pytest.mark.parametrize("changes", [{"seed": 999}, {"site": "layers.9"}, {"epoch": 7}])
def test_a_decision_on_what_is_not_there_is_a_recorded_wait(play: Play, changes: dict[str, object]) -> None:
    world = FaultyWorld(grow_at=1, alter={"score_sites": lambda decision: decision.model_copy(update=changes)})
    assert play(world, whole_run(2)).outcome is Outcome.COMPLETED
    assert waits(world) == [(1, "failed")]
    assert world.adaptations == []


@pytest.mark.fault("B6", "I10")
def test_a_strategist_that_never_answers_is_a_recorded_wait(
    temporal_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esper.runtime.temporal.options.DECISION_LIMIT", timedelta(seconds=1))
    world = FakeWorld(grow_at=1)

    async def whole() -> RunRecord:
        async with stage(temporal_address, world, without=(queues.TAMIYO,)) as on:
            return await (await on.start(configuration(3))).result()

    assert asyncio.run(whole()).outcome is Outcome.COMPLETED
    assert waits(world) == [(1, "failed"), (2, "failed")]
