"""What a run's workflow enters into the library, on real SQLite: twice is once."""

from collections.abc import Callable
from typing import Any

import pytest
from activity_bench import Bench
from book_entries import growth
from fake_activities import REF
from fake_activities import SITE
from fake_activities import FakeWorld

from esper.activities.urza import UrzaActivities
from esper.contracts.enums import AdaptationState
from esper.contracts.enums import Outcome
from esper.contracts.enums import Verdict
from esper.contracts.operational import Adaptation
from esper.contracts.operational import AdaptationDecision
from esper.contracts.operational import HeadRef
from esper.contracts.operational import JudgeReport
from esper.contracts.orders import EpochRequest
from esper.contracts.orders import KnownRun
from esper.contracts.orders import RecordAdaptation
from esper.contracts.orders import RecordDecision
from esper.contracts.orders import RecordOutcome
from esper.contracts.orders import RecordRun
from esper.contracts.orders import RunRecord
from esper.errors import RunConflict

Play = Callable[..., Any]


def decision(reason: str = "because") -> AdaptationDecision:
    return growth(run_id="r1", reason=reason)


def adaptation(state: AdaptationState, **known: Any) -> Adaptation:
    return Adaptation(
        adaptation_id="r1/a1",
        number=1,
        epoch=1,
        site=SITE.site,
        seed=0,
        seed_generation=0,
        blueprint="bottleneck",
        state=state,
        reason="because",
        **known,
    )


async def begun(bench: Bench) -> tuple[UrzaActivities, KnownRun]:
    activities = UrzaActivities(bench.connections)
    known = await bench.run(activities.record_run, RecordRun(run_id="r1", config=bench.config()))
    return activities, known


async def with_a_report(bench: Bench) -> None:
    lease = await bench.library.claim("r1", "q")
    head = HeadRef(digest=REF.digest, parent=None, step=10, epoch=1)
    report = FakeWorld()._report(EpochRequest(lease=lease, epoch=1), ()).model_copy(update={"head": head})
    await bench.library.commit_head(lease, head=head, manifest=REF, parent=None, report=report)


def test_all_four_are_served() -> None:
    names = {activity.__name__ for activity in UrzaActivities(None).all()}  # type: ignore[arg-type]
    assert names == {"record_run", "record_decision", "record_adaptation", "record_outcome"}


def test_a_new_run_has_no_past_and_one_that_goes_on_has(play: Play) -> None:
    async def scene(bench: Bench) -> tuple[KnownRun, KnownRun]:
        activities, first = await begun(bench)
        await with_a_report(bench)
        for _ in range(2):
            await bench.run(activities.record_decision, RecordDecision(urza=bench.urza, decision=decision()))
            ordered = RecordAdaptation(
                run_id="r1", urza=bench.urza, adaptation=adaptation(AdaptationState.ORDERED, apply_step=20)
            )
            await bench.run(activities.record_adaptation, ordered)
        return first, (await begun(bench))[1]

    first, second = play(scene)
    assert (first.report, first.adaptations, first.decisions, first.open_orders) == (None, (), 0, ())
    assert first.record.outcome is Outcome.RUNNING
    assert second.report is not None
    assert [point.epoch for point in second.losses] == [1]
    assert (second.decided_epoch, second.decisions, len(second.adaptations)) == (1, 1, 1)
    assert [(again.adaptation_id, again.site, again.site_samples) for again in second.open_orders] == [
        ("r1/a1", SITE, REF)
    ]


@pytest.mark.parametrize("state", [AdaptationState.TRAINING, AdaptationState.MISSED])
def test_what_was_grafted_or_missed_is_not_forged_again(play: Play, state: AdaptationState) -> None:
    async def scene(bench: Bench) -> KnownRun:
        activities, _ = await begun(bench)
        await bench.run(activities.record_decision, RecordDecision(urza=bench.urza, decision=decision()))
        recorded = RecordAdaptation(run_id="r1", urza=bench.urza, adaptation=adaptation(state))
        await bench.run(activities.record_adaptation, recorded)
        return (await begun(bench))[1]

    assert play(scene).open_orders == ()


def test_another_run_of_that_id_is_a_conflict(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        activities, _ = await begun(bench)
        other = RecordRun(run_id="r1", config=bench.config(training={"batch_size": 8}))
        with pytest.raises(RunConflict, match="batch_size"):
            await bench.run(activities.record_run, other)

    play(scene)


def test_the_first_decision_on_an_epoch_is_the_decision(play: Play) -> None:
    async def scene(bench: Bench) -> AdaptationDecision:
        activities, _ = await begun(bench)
        await bench.run(activities.record_decision, RecordDecision(urza=bench.urza, decision=decision()))
        return await bench.run(
            activities.record_decision, RecordDecision(urza=bench.urza, decision=decision("another reason"))
        )

    assert play(scene).reason == "because"


def test_a_verdict_is_recorded_with_its_adaptation(play: Play) -> None:
    judge = JudgeReport(run_id="r1", adaptation_id="r1/a1", verdict=Verdict.KEEP, step=50, reason="it paid")

    async def scene(bench: Bench) -> tuple[JudgeReport, ...]:
        activities, _ = await begun(bench)
        for state, known in (
            (AdaptationState.TRAINING, {}),
            (AdaptationState.FOSSILIZED, {"judge": judge}),
            (AdaptationState.TRAINING, {}),
        ):
            recorded = await bench.run(
                activities.record_adaptation,
                RecordAdaptation(run_id="r1", urza=bench.urza, adaptation=adaptation(state, **known)),
            )
        assert recorded.adaptation.state is AdaptationState.FOSSILIZED, "the first end stands"
        return await bench.library.judgements("r1")

    assert play(scene) == (judge,)


def test_an_outcome_may_be_recorded_twice(play: Play) -> None:
    async def scene(bench: Bench) -> RunRecord:
        activities, _ = await begun(bench)
        failed = RecordOutcome(
            run_id="r1",
            urza=bench.urza,
            outcome=Outcome.FAILED,
            restarts=2,
            warnings=("slow",),
            failure={"code": "ESP-601", "message": "x", "hint": None, "run_id": "r1"},
        )
        first = await bench.run(activities.record_outcome, failed)
        assert await bench.run(activities.record_outcome, failed) == first
        return first

    record = play(scene)
    assert (record.outcome, record.restarts, record.warnings) == (Outcome.FAILED, 2, ("slow",))
    assert record.failure is not None
    assert record.failure["code"] == "ESP-601"
