"""The run workflow on a real server: ordering, adaptation, pause, loss, cancellation, continue-as-new."""

from collections.abc import Callable
from typing import Any

import pytest
from fake_activities import STEPS_PER_EPOCH
from fake_activities import FakeWorld
from temporalio.client import WorkflowExecutionStatus
from temporalio.client import WorkflowFailureError
from temporalio.client import WorkflowHandle
from temporalio.client import WorkflowUpdateFailedError
from temporalio.exceptions import ApplicationError
from temporalio.worker import Replayer
from workflow_stage import WORKFLOWS
from workflow_stage import Stage
from workflow_stage import configuration

from esper.contracts.enums import AdaptationState
from esper.contracts.enums import Outcome
from esper.contracts.enums import Verdict
from esper.contracts.messages import CullSeed
from esper.contracts.messages import Pause
from esper.contracts.messages import PinSite
from esper.contracts.messages import RequestAdaptation
from esper.contracts.messages import Resume
from esper.contracts.messages import Stop
from esper.contracts.messages import Veto
from esper.contracts.orders import RunRecord
from esper.errors import TargetError
from esper.runtime.temporal.failures import to_failure
from esper.runtime.temporal.plugin import EsperPlugin
from esper.workflows.training_run import TrainingRun

pytestmark = pytest.mark.temporal

Play = Callable[..., Any]


async def replayed(handle: WorkflowHandle[Any, Any]) -> list[str]:
    """Replays the history on the present code and gives back its event names."""
    history = await handle.fetch_history()
    await Replayer(workflows=WORKFLOWS, plugins=[EsperPlugin()]).replay_workflow(history)
    return [event.WhichOneof("attributes") for event in history.events]


def test_a_run_without_growth_completes_every_epoch(play: Play) -> None:
    world = FakeWorld()

    async def scene(on: Stage) -> RunRecord:
        return await (await on.start(configuration(5, tamiyo={"policy": "none"}))).result()

    record = play(world, scene)
    assert record.outcome is Outcome.COMPLETED
    assert [what for what in world.journal if what[0] == "epoch"] == [("epoch", n) for n in range(1, 6)]
    assert not [what for what in world.journal if what[0] == "score"]


@pytest.mark.parametrize("allowed", [10, 25])
def test_a_step_may_be_silent_for_as_long_as_its_run_allows(play: Play, allowed: int) -> None:
    async def scene(on: Stage) -> dict[str, int]:
        config = configuration(2, tamiyo={"policy": "none"}, training={"step_timeout_s": float(allowed)})
        handle = await on.start(config)
        await handle.result()
        events = (await handle.fetch_history()).events
        scheduled = [
            event.activity_task_scheduled_event_attributes
            for event in events
            if event.HasField("activity_task_scheduled_event_attributes")
        ]
        return {each.activity_type.name: each.heartbeat_timeout.seconds for each in scheduled}

    silences = play(FakeWorld(), scene)
    assert (silences["train_epoch"], silences["load_run"], silences["record_run"]) == (allowed, 10, 0)


@pytest.mark.parametrize("cached", [1000, 0])
def test_growth_is_decided_forged_delivered_judged_and_kept(play: Play, cached: int) -> None:
    world = FakeWorld(grow_at=2, epoch_seconds=0.1)

    async def scene(on: Stage) -> tuple[RunRecord, list[str], Any]:
        handle = await on.start(configuration(8))
        record = await handle.result()
        return record, await replayed(handle), await handle.query(TrainingRun.status)

    record, events, status = play(world, scene, cached=cached)
    assert record.outcome is Outcome.COMPLETED
    final = world.adaptations[-1]
    assert final.state is AdaptationState.FOSSILIZED
    assert status.live_kernels == 1
    assert final.apply_step == (2 + 1) * STEPS_PER_EPOCH
    assert final.epoch == 2
    assert "workflow_execution_signaled_event_attributes" in events
    assert events.count("start_child_workflow_execution_initiated_event_attributes") == 8
    judged, after = world.journal.index(("judge", final.adaptation_id)), world.journal.index(("epoch", 6))
    assert world.journal.index(("epoch", 5)) < judged < after
    assert [what for what in world.journal if what[0] == "score"] == [("score", n) for n in range(1, 8)]


def test_an_epoch_is_ordered_only_on_the_decision_that_may_change_it(play: Play) -> None:
    world = FakeWorld(grow_at=2)

    async def scene(on: Stage) -> RunRecord:
        return await (await on.start(configuration(6))).result()

    play(world, scene)
    expected = {request.epoch: [a.apply_step for a in request.schedule] for request in world.requests}
    assert expected[4] == [30]
    assert expected[1] == expected[2] == expected[3] == []


def test_a_culled_graft_frees_its_site(play: Play) -> None:
    world = FakeWorld(grow_at=1, verdict=Verdict.CULL)

    async def scene(on: Stage) -> RunRecord:
        return await (await on.start(configuration(6))).result()

    play(world, scene)
    assert world.adaptations[-1].state is AdaptationState.CULLED


@pytest.mark.fault("B5", "I10")
def test_a_failing_forge_costs_the_adaptation_and_not_the_run(play: Play) -> None:
    world = FakeWorld(grow_at=1, forge_fails=True)

    async def scene(on: Stage) -> RunRecord:
        return await (await on.start(configuration(5))).result()

    assert play(world, scene).outcome is Outcome.COMPLETED
    assert world.adaptations[-1].state is AdaptationState.FAILED
    assert "the forge is cold" in world.adaptations[-1].reason
    assert any(what[0] == "abandon" for what in world.journal)


@pytest.mark.fault("B6", "I10")
def test_a_failing_strategist_means_no_growth(play: Play) -> None:
    world = FakeWorld(grow_at=1, score_fails=True)

    async def scene(on: Stage) -> RunRecord:
        return await (await on.start(configuration(3))).result()

    assert play(world, scene).outcome is Outcome.COMPLETED
    assert world.adaptations == []


def test_early_stop_ends_with_the_epoch_that_counts(play: Play) -> None:
    world = FakeWorld(stop_at=3)

    async def scene(on: Stage) -> RunRecord:
        return await (await on.start(configuration(10))).result()

    record = play(world, scene)
    assert (record.outcome, record.epochs) == (Outcome.COMPLETED, 3)


def test_pause_holds_and_resume_goes_on(play: Play) -> None:
    world = FakeWorld(epoch_seconds=0.2)

    async def scene(on: Stage) -> tuple[RunRecord, int, str]:
        handle = await on.start(configuration(6, tamiyo={"policy": "none"}))
        await on.until(lambda: world.epoch >= 1)
        await on.tell(handle, "pause", Pause())
        with pytest.raises(WorkflowUpdateFailedError) as refused:
            await on.tell(handle, "pause", Pause())
        await on.until(lambda: Outcome.PAUSED in world.outcomes)
        at = world.epoch
        await on.tell(handle, "resume", Resume())
        return await handle.result(), at, str(refused.value.cause)

    record, at, refusal = play(world, scene)
    assert record.outcome is Outcome.COMPLETED
    assert 1 <= at < 6
    assert "already paused" in refusal
    assert [n for what, n in world.journal if what == "epoch"] == [1, 2, 3, 4, 5, 6]


def test_stop_keeps_what_is_done(play: Play) -> None:
    world = FakeWorld(epoch_seconds=0.2)

    async def scene(on: Stage) -> RunRecord:
        handle = await on.start(configuration(50))
        await on.until(lambda: world.epoch >= 2)
        await on.tell(handle, "stop", Stop())
        return await handle.result()

    record = play(world, scene)
    assert record.outcome is Outcome.STOPPED
    assert record.epochs < 50
    assert ("release", Outcome.STOPPED) in world.journal


def test_cancelling_in_the_web_ui_means_stop(play: Play) -> None:
    world = FakeWorld(epoch_seconds=0.2)

    async def scene(on: Stage) -> RunRecord:
        handle = await on.start(configuration(50))
        await on.until(lambda: world.epoch >= 2)
        await handle.cancel()
        return await handle.result()

    assert play(world, scene).outcome is Outcome.STOPPED
    assert ("release", Outcome.STOPPED) in world.journal


def test_a_lost_trainer_is_one_loss_and_the_run_ends(play: Play) -> None:
    world = FakeWorld(lose_at=3)

    async def scene(on: Stage) -> RunRecord:
        return await (await on.start(configuration(5))).result()

    record = play(world, scene)
    assert record.outcome is Outcome.COMPLETED
    assert record.restarts == 1
    assert [n for what, n in world.journal if what == "claim"] == [1, 2]
    assert [n for what, n in world.journal if what == "epoch"] == [1, 2, 3, 4, 5]


@pytest.mark.fault("F1", "I8")
def test_continue_as_new_carries_the_run_on(play: Play) -> None:
    world = FakeWorld(grow_at=2)

    async def scene(on: Stage) -> tuple[RunRecord, WorkflowExecutionStatus | None]:
        handle = await on.start(configuration(9), continue_after_epochs=2)
        first = on.client.get_workflow_handle(handle.id, run_id=handle.first_execution_run_id)
        record = await handle.result()
        return record, (await first.describe()).status

    record, status = play(world, scene)
    assert record.outcome is Outcome.COMPLETED
    assert status is WorkflowExecutionStatus.CONTINUED_AS_NEW
    assert [n for what, n in world.journal if what == "epoch"] == list(range(1, 10))
    assert world.adaptations[-1].state is AdaptationState.FOSSILIZED
    assert [n for what, n in world.journal if what == "claim"] == [1]


def test_an_error_of_the_task_fails_the_run_with_its_own_code(play: Play) -> None:
    error = TargetError("ESP-310", "task.target: there is no module 'nowhere'", hint="check the name")
    world = FakeWorld(load_error=to_failure(error))

    async def scene(on: Stage) -> ApplicationError:
        with pytest.raises(WorkflowFailureError) as failed:
            await (await on.start(configuration(3))).result()
        assert isinstance(failed.value.cause, ApplicationError)
        return failed.value.cause

    cause = play(world, scene)
    assert cause.type == "TargetError"
    assert cause.details[0]["code"] == "ESP-310"
    assert world.outcomes[-1] is Outcome.FAILED


def test_a_person_can_order_veto_pin_and_cull(play: Play) -> None:
    world = FakeWorld(epoch_seconds=0.3)

    async def scene(on: Stage) -> tuple[RunRecord, list[str]]:
        handle = await on.start(configuration(12))
        await on.until(lambda: world.epoch >= 1)
        refusals = []
        for update, payload in (
            ("request_adaptation", RequestAdaptation(site="layers.9", blueprint="bottleneck")),
            ("veto", Veto(adaptation_id=f"{handle.id}/a7")),
            ("cull_seed", CullSeed(site="layers.0")),
        ):
            with pytest.raises(WorkflowUpdateFailedError) as refused:
                await on.tell(handle, update, payload)
            refusals.append(str(refused.value.cause))
        await on.tell(handle, "request_adaptation", RequestAdaptation(site="layers.0", blueprint="bottleneck"))
        await on.until(lambda: any(a.state is AdaptationState.TRAINING for a in world.adaptations))
        await on.tell(handle, "cull_seed", CullSeed(site="layers.0"))
        await on.tell(handle, "pin_site", PinSite(site="layers.0"))
        return await handle.result(), refusals

    record, refusals = play(world, scene)
    assert record.outcome is Outcome.COMPLETED
    assert "no site 'layers.9'" in refusals[0]
    assert "no adaptation" in refusals[1]
    assert "nothing lives" in refusals[2]
    assert any(what[0] == "remove" for what in world.journal)


def test_asap_mode_does_not_wait_for_decisions(play: Play) -> None:
    world = FakeWorld(grow_at=2, epoch_seconds=0.4)

    async def scene(on: Stage) -> RunRecord:
        return await (await on.start(configuration(12, delivery={"mode": "asap"}))).result()

    assert play(world, scene).outcome is Outcome.COMPLETED
    assert world.adaptations[-1].state is AdaptationState.FOSSILIZED
