"""The run workflow when things go wrong: trainers, forges, policies, messages, and people in a hurry."""

from collections.abc import Callable
from typing import Any

import pytest
from fake_activities import PINNED
from fake_activities import SITE
from fake_activities import FakeWorld
from fake_activities import head
from faulty_world import FaultyWorld
from temporalio.client import WorkflowFailureError
from temporalio.client import WorkflowUpdateFailedError
from temporalio.exceptions import ApplicationError
from workflow_stage import Stage
from workflow_stage import configuration

from esper.contracts.enums import AdaptationState
from esper.contracts.enums import Outcome
from esper.contracts.enums import Verdict
from esper.contracts.messages import CullSeed
from esper.contracts.messages import Envelope
from esper.contracts.messages import Pause
from esper.contracts.messages import Resume
from esper.contracts.messages import Stop
from esper.contracts.messages import TrainerLost
from esper.contracts.messages import Veto
from esper.contracts.operational import Adaptation
from esper.contracts.operational import KernelDelivery
from esper.contracts.operational import ScheduledAdaptation
from esper.contracts.orders import BuildRequest
from esper.contracts.orders import EpochRequest
from esper.contracts.orders import KnownRun
from esper.contracts.orders import Lease
from esper.contracts.orders import OpenOrder
from esper.contracts.orders import RunRecord
from esper.errors import DatabaseUnavailable
from esper.errors import RunConflict
from esper.runtime.temporal import queues
from esper.runtime.temporal.failures import to_failure
from esper.runtime.temporal.options import LOST_TRAINER_LIMIT
from esper.workflows.tezzeret_compile import TezzeretCompile

pytestmark = pytest.mark.temporal

Play = Callable[..., Any]

PLAIN: dict[str, dict[str, object]] = {"tamiyo": {"policy": "none"}}


def lost(kind: str = "LeaseLost") -> ApplicationError:
    return ApplicationError("lost", type=kind, non_retryable=True)


def busy() -> ApplicationError:
    return ApplicationError("busy", type="TrainerBusy")


def whole_run(epochs: int, **sections: dict[str, object]) -> Callable[[Stage], Any]:
    async def scene(on: Stage) -> RunRecord:
        return await (await on.start(configuration(epochs, **sections))).result()

    return scene


def failing_run(epochs: int, **request: object) -> Callable[[Stage], Any]:
    async def scene(on: Stage) -> ApplicationError:
        with pytest.raises(WorkflowFailureError) as failed:
            await (await on.start(configuration(epochs, **PLAIN), **request)).result()
        assert isinstance(failed.value.cause, ApplicationError)
        return failed.value.cause

    return scene


def epochs_of(world: FakeWorld) -> list[int]:
    return [epoch for what, epoch in world.journal if what == "epoch"]


@pytest.mark.parametrize("by", ["update", "web ui"])
def test_a_run_that_waits_for_a_trainer_can_be_stopped(play: Play, by: str) -> None:
    world = FaultyWorld(before={"claim_trainer": [busy() for _ in range(1000)]})

    async def scene(on: Stage) -> RunRecord:
        handle = await on.start(configuration(5))
        await on.until(lambda: len(world.before["claim_trainer"]) < 999)
        await (handle.cancel() if by == "web ui" else on.tell(handle, "stop", Stop()))
        return await handle.result()

    assert play(world, scene).outcome is Outcome.STOPPED
    assert world.outcomes == [Outcome.STOPPED]


@pytest.mark.parametrize("count", [LOST_TRAINER_LIMIT + 1, 2])
def test_trainers_that_are_lost_in_a_row_fail_the_run_in_the_end(play: Play, count: int) -> None:
    world = FaultyWorld(before={"train_epoch": [lost() for _ in range(2 * count)]})
    if count > LOST_TRAINER_LIMIT:
        cause = play(world, failing_run(1))
        assert (cause.type, cause.details[0]["code"]) == ("RunFailed", "ESP-601")
        assert "lost in a row" in str(cause)
        assert world.outcomes[-1] is Outcome.FAILED
    else:
        assert play(world, whole_run(1, **PLAIN)).outcome is Outcome.COMPLETED


def test_a_trainer_that_drains_costs_no_penalty(play: Play) -> None:
    drained = LOST_TRAINER_LIMIT + 1
    world = FaultyWorld(before={"train_epoch": [lost("WorkerDraining") for _ in range(drained)]})
    record = play(world, whole_run(1, **PLAIN))
    assert (record.outcome, record.restarts) == (Outcome.COMPLETED, drained)


def test_a_service_that_is_away_for_a_while_is_survived(play: Play) -> None:
    away = to_failure(DatabaseUnavailable("ESP-331", "the database is away"))
    world = FaultyWorld(before={"train_epoch": [away]})
    record = play(world, whole_run(2, **PLAIN))
    assert (record.outcome, record.restarts) == (Outcome.COMPLETED, 1)


def test_a_trainer_that_is_lost_while_paused_leaves_the_run_paused(play: Play) -> None:
    world = FakeWorld(epoch_seconds=0.2)

    async def scene(on: Stage) -> tuple[RunRecord, int]:
        handle = await on.start(configuration(4, **PLAIN))
        await on.until(lambda: world.epoch >= 1)
        await on.tell(handle, "pause", Pause())
        await on.until(lambda: Outcome.PAUSED in world.outcomes)
        message = Envelope(
            event_id="1",
            trace_id=handle.id,
            causation_id="1",
            sender="test",
            payload=TrainerLost(task_queue=PINNED, reason="killed"),
        )
        await handle.signal("trainer_lost", message)
        await on.until(
            lambda: (
                ("checkpoint", 1) in world.journal[world.journal.index(("claim", 2)) :]
                if ("claim", 2) in world.journal
                else False
            )
        )
        before = len(world.outcomes)
        await on.tell(handle, "resume", Resume())
        return await handle.result(), before

    record, before = play(world, scene)
    assert (record.outcome, record.restarts) == (Outcome.COMPLETED, 1)
    assert set(world.outcomes[world.outcomes.index(Outcome.PAUSED) : before]) == {Outcome.PAUSED}
    assert epochs_of(world) == [1, 2, 3, 4]


def test_a_paused_run_continues_as_new_still_paused(play: Play) -> None:
    world = FakeWorld(epoch_seconds=0.2)

    async def scene(on: Stage) -> RunRecord:
        handle = await on.start(configuration(5, **PLAIN), continue_after_epochs=1)
        await on.until(lambda: world.epoch >= 1)
        await on.tell(handle, "pause", Pause())
        await on.until(lambda: Outcome.PAUSED in world.outcomes)
        await on.tell(handle, "resume", Resume())
        return await handle.result()

    assert play(world, scene).outcome is Outcome.COMPLETED
    assert epochs_of(world) == [1, 2, 3, 4, 5]
    assert [n for what, n in world.journal if what == "claim"] == [1]


def test_a_veto_comes_before_the_trainer_has_the_kernel_or_not_at_all(play: Play) -> None:
    world = FakeWorld(grow_at=1, epoch_seconds=0.3)

    async def scene(on: Stage) -> tuple[RunRecord, str]:
        handle = await on.start(configuration(6, delivery={"lag_epochs": 2}))
        await on.until(lambda: bool(world.grafts))
        with pytest.raises(WorkflowUpdateFailedError) as refused:
            await on.tell(handle, "veto", Veto(adaptation_id=f"{handle.id}/a1"))
        return await handle.result(), str(refused.value.cause)

    record, refusal = play(world, scene)
    assert record.outcome is Outcome.COMPLETED
    assert "is with the trainer" in refusal
    assert world.adaptations[-1].state is AdaptationState.FOSSILIZED


@pytest.mark.fault("F3")
def test_a_graft_that_was_recorded_stands_though_nobody_was_told(play: Play) -> None:
    world = FaultyWorld(grow_at=1, epoch_seconds=0.05, after={"install_kernel": [lost("ValueError")]})
    assert play(world, whole_run(6)).outcome is Outcome.COMPLETED
    assert any(what == "abandon" for what, _ in world.journal)
    assert world.adaptations[-1].state is AdaptationState.FOSSILIZED
    assert world.adaptations[-1].judge.verdict is Verdict.KEEP


@pytest.mark.fault("I8", "I10")
def test_a_kernel_that_cannot_be_installed_costs_its_adaptation(play: Play) -> None:
    world = FaultyWorld(grow_at=1, before={"install_kernel": [lost("ValueError")]})
    assert play(world, whole_run(4)).outcome is Outcome.COMPLETED
    assert [a.state for a in world.adaptations][-1] is AdaptationState.FAILED


def test_a_verdict_that_nobody_was_told_is_asked_for_again(play: Play) -> None:
    world = FaultyWorld(grow_at=1, epoch_seconds=0.05, after={"judge_seed": [lost()]})
    assert play(world, whole_run(6)).outcome is Outcome.COMPLETED
    final = world.adaptations[-1]
    assert (final.state, final.judge.verdict) == (AdaptationState.FOSSILIZED, Verdict.KEEP)


def test_a_cull_survives_the_loss_of_the_trainer(play: Play) -> None:
    world = FaultyWorld(grow_at=1, epoch_seconds=0.3, before={"remove_seed": [lost()]})

    async def scene(on: Stage) -> RunRecord:
        handle = await on.start(configuration(7))
        await on.until(lambda: any(a.state is AdaptationState.TRAINING for a in world.adaptations))
        await on.tell(handle, "cull_seed", CullSeed(site="layers.0"))
        return await handle.result()

    record = play(world, scene)
    assert (record.outcome, record.restarts) == (Outcome.COMPLETED, 1)
    assert [what for what, _ in world.journal].count("remove") == 1


@pytest.mark.fault("B6", "I10")
def test_a_decision_that_makes_no_sense_is_no_growth(play: Play) -> None:
    world = FaultyWorld(grow_at=1, alter={"score_sites": lambda decision: decision.model_copy(update={"seed": 999})})
    assert play(world, whole_run(2)).outcome is Outcome.COMPLETED
    assert [decision.code for decision in world.decisions] == ["failed"]
    assert world.adaptations == []


@pytest.mark.fault("I3", "I8")
def test_a_kernel_without_a_certificate_is_a_failed_one(play: Play) -> None:
    def bare(built: Any) -> Any:
        return built.model_copy(update={"kernel": built.kernel.model_copy(update={"certificate": None})})

    world = FaultyWorld(grow_at=1, alter={"publish_kernel": bare})
    assert play(world, whole_run(4)).outcome is Outcome.COMPLETED
    assert "without a certificate" in world.adaptations[-1].reason


@pytest.mark.fault("F4")
def test_messages_that_make_no_sense_change_nothing(play: Play) -> None:
    world = FakeWorld(epoch_seconds=0.2)

    async def scene(on: Stage) -> RunRecord:
        handle = await on.start(configuration(3, **PLAIN))
        await on.until(lambda: world.epoch >= 1)
        for nonsense in (["kernel"], [{"version": 2}], [{"payload": {"topic": "kernel.ready"}}], [None], []):
            await handle.signal("kernel_ready", args=nonsense)
            with pytest.raises(WorkflowUpdateFailedError):
                await handle.execute_update("cull_seed", args=nonsense)
        for signal in ("trainer_lost", "kernel_failed", "nobody_knows_this"):
            await handle.signal(signal)
        return await handle.result()

    assert play(world, scene).outcome is Outcome.COMPLETED


@pytest.mark.fault("C8")
def test_a_run_id_that_is_taken_leaves_the_other_run_alone(play: Play) -> None:
    conflict = RunConflict("ESP-501", "run r exists with another configuration")
    world = FaultyWorld(before={"record_run": [to_failure(conflict)]})
    cause = play(world, failing_run(2))
    assert (cause.type, cause.details[0]["code"]) == ("RunConflict", "ESP-501")
    assert world.outcomes == []


@pytest.mark.fault("C8")
def test_a_run_is_resumed_from_the_head_it_names_or_not_at_all(play: Play) -> None:
    world = FakeWorld()
    cause = play(world, failing_run(2, expected_head=head(70).digest))
    assert (cause.type, cause.details[0]["code"]) == ("RunConflict", "ESP-502")
    assert ("release", Outcome.FAILED) in world.journal
    assert epochs_of(world) == []


@pytest.mark.fault("F1", "I8")
def test_what_was_ordered_before_a_run_was_stopped_is_forged_when_it_goes_on(play: Play) -> None:
    world = FaultyWorld(epoch=1, epoch_seconds=0.05)

    def past(known: KnownRun) -> KnownRun:
        run_id = known.record.run_id
        lease = Lease(run_id=run_id, task_queue=PINNED, lease_gen=1)
        adaptation = Adaptation(
            adaptation_id=f"{run_id}/a1",
            number=1,
            epoch=1,
            site=SITE.site,
            seed=0,
            seed_generation=0,
            blueprint="bottleneck",
            apply_step=20,
            state=AdaptationState.DELIVERED,
            reason="because",
        )
        return known.model_copy(
            update={
                "adaptations": (adaptation,),
                "report": world._report(EpochRequest(lease=lease, epoch=1), ()),
                "decided_epoch": 1,
                "open_orders": (OpenOrder(adaptation_id=adaptation.adaptation_id, site=SITE),),
            }
        )

    world.alter["record_run"] = past
    assert play(world, whole_run(6)).outcome is Outcome.COMPLETED
    assert epochs_of(world) == [2, 3, 4, 5, 6]
    assert (world.adaptations[-1].adaptation_id[-2:], world.adaptations[-1].state) == ("a1", AdaptationState.FOSSILIZED)


@pytest.mark.fault("I8")
def test_what_is_on_its_way_when_the_run_is_complete_has_missed_it(play: Play) -> None:
    world = FakeWorld(grow_at=1, stop_at=2, epoch_seconds=0.2)
    assert play(world, whole_run(9, delivery={"lag_epochs": 5})).outcome is Outcome.COMPLETED
    assert world.adaptations[-1].state is AdaptationState.MISSED


def cold() -> ApplicationError:
    return ApplicationError("not now")


@pytest.mark.fault("B6", "I10")
@pytest.mark.parametrize("child", ["tamiyo/1", "tezzeret/a1"])
def test_a_child_that_a_person_cancels_costs_growth_and_not_the_run(play: Play, child: str) -> None:
    stuck = "score_sites" if "tamiyo" in child else "build_kernel"
    world = FaultyWorld(grow_at=1, before={stuck: [cold() for _ in range(4)]})

    async def scene(on: Stage) -> RunRecord:
        handle = await on.start(configuration(4))
        await on.until(lambda: len(world.before[stuck]) < 4)
        await on.client.get_workflow_handle(f"{handle.id}/{child}").cancel()
        return await handle.result()

    assert play(world, scene).outcome is Outcome.COMPLETED
    if "tezzeret" in child:
        assert world.adaptations[-1].state is AdaptationState.FAILED
        assert "cancelled" in world.adaptations[-1].reason


@pytest.mark.fault("F1")
def test_a_kernel_for_a_run_that_is_over_is_made_all_the_same(play: Play) -> None:
    world = FakeWorld()
    config = configuration(1)
    request = BuildRequest(
        run_id="nobody",
        run_seed=0,
        adaptation=ScheduledAdaptation(
            adaptation_id="nobody/a1",
            number=1,
            site=SITE.site,
            seed=0,
            seed_generation=0,
            blueprint="bottleneck",
            hyperparameters={},
            decided_epoch=1,
            apply_step=20,
        ),
        site=SITE,
        site_samples=None,
        tezzeret=config.tezzeret,
        optimizer=config.optimizer,
        urza=config.urza,
    )

    async def scene(on: Stage) -> KernelDelivery | None:
        return await on.client.execute_workflow(
            TezzeretCompile.run, request, id=f"late-{id(world)}", task_queue=queues.ORCHESTRATION
        )

    made = play(world, scene)
    assert made.adaptation == request.adaptation
