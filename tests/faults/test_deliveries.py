"""Kernels that come twice, late, in another order, or for what is over: each is used at most once, and counted."""

import asyncio
from collections.abc import Awaitable
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from typing import TypeVar

import pytest
from book_entries import growth
from book_entries import kernel_for
from book_entries import progress
from book_entries import report
from fake_activities import FakeWorld
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from temporalio import activity
from temporalio.client import WorkflowHandle
from temporalio.client import WorkflowUpdateFailedError
from temporalio.service import RPCError
from temporalio.service import RPCStatusCode
from workflow_stage import Stage
from workflow_stage import configuration
from workflow_stage import stage

from esper.activities import names
from esper.contracts.enums import AdaptationState
from esper.contracts.enums import FactKind
from esper.contracts.enums import Outcome
from esper.contracts.messages import Envelope
from esper.contracts.messages import KernelReady
from esper.contracts.messages import RequestAdaptation
from esper.contracts.operational import Adaptation
from esper.contracts.operational import Fact
from esper.contracts.operational import KernelDelivery
from esper.contracts.orders import InstallRequest
from esper.contracts.orders import InstallResult
from esper.contracts.orders import RunRecord
from esper.contracts.orders import RunStatus
from esper.contracts.orders import TrainingState
from esper.workflows.run_progress import RunProgress
from esper.workflows.training_run import TrainingRun

ResultT = TypeVar("ResultT")


def play(address: str, world: FakeWorld, scene: Callable[[Stage], Awaitable[ResultT]]) -> ResultT:
    async def whole() -> ResultT:
        async with stage(address, world) as on:
            return await scene(on)

    return asyncio.run(whole())


def letter(run_id: str, delivery: KernelDelivery) -> Envelope[KernelReady]:
    return Envelope(
        event_id=f"{delivery.adaptation.adaptation_id}/again",
        trace_id=run_id,
        causation_id="test",
        sender="test",
        payload=KernelReady(delivery=delivery),
    )


# --- the pure part ------------------------------------------------------------------------------------------------


def order(run: RunProgress, epoch: int) -> Adaptation:
    adaptation = run.book.order("r", growth(epoch), report(epoch), run.apply_step(epoch))
    assert adaptation is not None
    return adaptation


def fact(adaptation_id: str, kind: FactKind) -> Fact:
    step = 30 if kind is FactKind.GRAFT else 50
    judged = 50 if kind is FactKind.GRAFT else None
    return Fact(run_id="r", adaptation_id=adaptation_id, kind=kind, apply_step=step, seq=1, judge_step=judged)


CONTINUE = "continue as new"
COPIES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@pytest.mark.fault("F1", "I2", "I8")
@given(COPIES, st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_each_kernel_is_taken_once_however_often_and_in_whatever_order_it_comes(
    copies: list[int], shuffle: Any
) -> None:
    run = progress(200)
    kernels = [kernel_for(order(run, epoch)) for epoch in range(1, len(copies) + 1)]
    events: list[KernelDelivery | str] = [
        kernel for kernel, count in zip(kernels, copies, strict=True) for _ in range(count)
    ]
    events += [CONTINUE, CONTINUE]
    shuffle.shuffle(events)
    taken: list[str] = []
    for event in events:
        if isinstance(event, KernelDelivery):
            news = run.take_delivery(event)
            taken += [] if news is None else [news.adaptation_id]
        else:
            carried = TrainingState.model_validate_json(run.to_state().model_dump_json())
            run = progress(200, carried)
    assert sorted(taken) == [f"r/a{number}" for number in range(1, len(copies) + 1)]
    assert run.messages.repeated == sum(copies) - len(copies)
    assert (run.messages.stale, run.messages.dead_letters) == (0, 0)
    assert {sent.adaptation.adaptation_id for sent in run.book.deliveries()} == set(taken)


@pytest.mark.fault("F2", "I3", "I8")
@pytest.mark.parametrize("ended", [FactKind.CULL, FactKind.FOSSILIZE, FactKind.MISSED, FactKind.QUARANTINE])
def test_a_kernel_for_what_is_over_is_counted_and_changes_nothing(ended: FactKind) -> None:
    run = progress(200)
    adaptation = order(run, 1)
    if ended is not FactKind.MISSED:
        run.book.apply(fact(adaptation.adaptation_id, FactKind.GRAFT))
    run.book.apply(fact(adaptation.adaptation_id, ended))
    before = run.book.all()
    assert run.take_delivery(kernel_for(adaptation)) is None
    assert run.book.all() == before and run.book.deliveries() == ()
    assert run.messages.stale == 1
    assert adaptation.adaptation_id in run.messages.recent[0]


@pytest.mark.fault("F2", "I3")
def test_a_kernel_that_nobody_ordered_or_ordered_otherwise_is_stale() -> None:
    run = progress(200)
    adaptation = order(run, 1)
    elsewhere = adaptation.model_copy(update={"seed_generation": 7})
    unknown = adaptation.model_copy(update={"adaptation_id": "r/a9"})
    for wrong in (elsewhere, unknown):
        assert run.take_delivery(kernel_for(wrong)) is None
    assert run.messages.stale == 2
    assert "ordered otherwise" in run.messages.recent[0] and "not ordered" in run.messages.recent[1]
    assert run.take_delivery(kernel_for(adaptation)) is not None


@pytest.mark.fault("F5", "I6", "I8")
@given(st.permutations(["deliver 1", "deliver 2", "graft 1", "refuse 2"]))
@settings(deadline=None)
def test_of_two_adaptations_for_one_seed_the_first_is_grafted_and_the_other_ends(events: list[str]) -> None:
    """What the trainer recorded rules, in whatever order the news of both comes."""
    run = progress(200)
    first, second = order(run, 1), order(run, 2)
    for event in events:
        what, number = event.split()
        subject = first if number == "1" else second
        if what == "deliver":
            run.take_delivery(kernel_for(subject))
        elif what == "graft":
            run.book.apply(fact(subject.adaptation_id, FactKind.GRAFT))
        else:
            run.book.fail(subject.adaptation_id, AdaptationState.STALE, "the seed has been taken")
    states = [adaptation.state for adaptation in run.book.all()]
    assert states == [AdaptationState.TRAINING, AdaptationState.STALE]
    assert run.book.schedule() == () and run.book.deliveries() == ()


# --- on a real server ---------------------------------------------------------------------------------------------


@dataclass
class OlderLife(FakeWorld):
    """Its trainer finds that the seed has had another kernel since the order."""

    @activity.defn(name=names.INSTALL_KERNEL.name)
    async def install_kernel(self, request: InstallRequest) -> InstallResult:
        subject = request.delivery.adaptation.adaptation_id
        self.abandoned[subject] = "stale"
        return InstallResult(adaptation_id=subject, accepted=False, reason="stale: for generation 0, it is at 1")


def is_over(world: FakeWorld) -> bool:
    return any(a.state is AdaptationState.FOSSILIZED for a in world.adaptations)


@pytest.mark.temporal
@pytest.mark.fault("F1", "F2", "I2", "I8")
def test_a_kernel_sent_again_before_and_after_everything_is_grafted_once(temporal_address: str) -> None:
    world = FakeWorld(grow_at=1, epoch_seconds=0.1)

    async def scene(on: Stage) -> tuple[RunRecord, RunStatus, RPCStatusCode]:
        handle = await on.start(configuration(10), continue_after_epochs=2)
        await on.until(lambda: bool(world.adaptations))
        message = letter(handle.id, kernel_for(world.adaptations[0]))
        # One of these may be there before the forge's own; then that one comes second.
        for _ in range(3):
            await handle.signal("kernel_ready", message)
        await on.until(lambda: is_over(world))
        parts = world.epoch
        for _ in range(2):
            await handle.signal("kernel_ready", message)
        record = await handle.result()
        assert parts < 10
        status = await on.client.get_workflow_handle_for(TrainingRun.run, handle.id).query(TrainingRun.status)
        with pytest.raises(RPCError) as late:
            await on.client.get_workflow_handle(handle.id).signal("kernel_ready", message)
        return record, status, late.value.status

    record, status, late = play(temporal_address, world, scene)
    assert record.outcome is Outcome.COMPLETED
    # The trainer is asked at least once; what it does about it happens once.
    assert [fact.kind for fact in world.facts] == [FactKind.GRAFT, FactKind.FOSSILIZE]
    assert status.messages.repeated == 5
    assert (status.messages.stale, status.messages.dead_letters) == (0, 0)
    assert late is RPCStatusCode.NOT_FOUND


@pytest.mark.temporal
@pytest.mark.fault("F2", "I3", "I8")
def test_a_kernel_for_an_older_life_of_a_seed_is_stale_counted_and_shown(temporal_address: str) -> None:
    world = OlderLife(grow_at=1, epoch_seconds=0.05)

    async def scene(on: Stage) -> tuple[RunRecord, RunStatus]:
        handle: WorkflowHandle[Any, Any] = await on.start(configuration(3))
        return await handle.result(), await handle.query(TrainingRun.status)

    record, status = play(temporal_address, world, scene)
    assert record.outcome is Outcome.COMPLETED
    assert world.adaptations[-1].state is AdaptationState.STALE
    assert status.messages.stale == 1
    assert "generation 0" in status.messages.recent[0]
    assert any("not used" in warning for warning in world.warnings)


@pytest.mark.temporal
@pytest.mark.fault("F5", "I8")
def test_a_second_order_for_a_seed_is_refused_while_the_first_is_on_its_way(temporal_address: str) -> None:
    world = FakeWorld(grow_at=1, epoch_seconds=0.2)

    async def scene(on: Stage) -> tuple[RunRecord, list[str]]:
        handle = await on.start(configuration(5))
        await on.until(lambda: bool(world.adaptations))
        refusals = []
        for _ in range(2):
            with pytest.raises(WorkflowUpdateFailedError) as refused:
                await on.tell(handle, "request_adaptation", RequestAdaptation(site="layers.0", blueprint="bottleneck"))
            refusals.append(str(refused.value.cause))
        return await handle.result(), refusals

    record, refusals = play(temporal_address, world, scene)
    assert record.outcome is Outcome.COMPLETED
    assert all("one graft" in refusal for refusal in refusals)
    assert {adaptation.number for adaptation in world.adaptations} == {1}
