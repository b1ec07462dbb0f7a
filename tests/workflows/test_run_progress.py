"""Where a run stands: epochs in any order, what may be ordered, and what travels over continue-as-new."""

import pytest
from book_entries import LEASE
from book_entries import growth
from book_entries import loaded
from book_entries import progress
from book_entries import report
from fake_activities import SITE
from fake_activities import STEPS_PER_EPOCH
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from esper.contracts.assets import SiteContract
from esper.contracts.enums import AdaptationState
from esper.contracts.enums import DecisionKind
from esper.contracts.enums import FactKind
from esper.contracts.enums import Outcome
from esper.contracts.messages import RequestAdaptation
from esper.contracts.operational import Adaptation
from esper.contracts.operational import Fact
from esper.contracts.orders import KnownRun
from esper.contracts.orders import RunRecord
from esper.contracts.orders import ScoreRequest
from esper.contracts.orders import TrainingRequest
from esper.contracts.orders import TrainingState
from esper.runtime.remembering import KEPT_LOSSES
from esper.workflows.presentation import clipped
from esper.workflows.presentation import details
from esper.workflows.run_progress import RunProgress
from esper.workflows.tamiyo_decision import flaw_of


def adaptation(state: AdaptationState) -> Adaptation:
    return Adaptation(
        adaptation_id="r/a1",
        number=1,
        epoch=1,
        site="layers.0",
        seed=0,
        seed_generation=0,
        blueprint="bottleneck",
        apply_step=30,
        state=state,
        reason="because",
    )


@given(st.permutations(range(1, 9)), st.lists(st.integers(1, 8), max_size=6))
@settings(max_examples=100, deadline=None)
def test_epochs_are_entered_in_order_and_once(order: list[int], again: list[int]) -> None:
    run = progress(tamiyo={"policy": "none"})
    entered = [entry.epoch for epoch in [*order, *again] for entry in run.complete(report(epoch))]
    assert entered == list(range(1, 9))
    assert [point.epoch for point in run.losses] == entered


@given(st.integers(0, 12), st.integers(1, 4), st.sets(st.integers(1, 12), max_size=4), st.sampled_from([1, 2, 5]))
@settings(max_examples=200, deadline=None)
def test_no_epoch_is_ordered_before_the_decision_that_may_change_it(
    completed: int, lag: int, undecided: set[int], frequency: int
) -> None:
    run = progress(12, delivery={"lag_epochs": lag}, tamiyo={"adaptation_frequency": frequency})
    run.completed_epoch = completed
    run.undecided = {epoch: report(epoch) for epoch in undecided if epoch <= completed}
    orderable = run.orderable()
    assert all(completed < epoch <= min(completed + 2, 12) for epoch in orderable)
    for epoch in orderable:
        for decided in run.undecided:
            step = run.apply_step(decided)
            assert step is not None
            assert step >= epoch * STEPS_PER_EPOCH, "a decision that is not known must apply after this epoch"
    if completed < 12 and not run.undecided:
        assert completed + 1 in orderable


@given(st.integers(1, 100))
@settings(max_examples=30, deadline=None)
def test_what_travels_over_continue_as_new_is_bounded_and_whole(epochs: int) -> None:
    run = progress(200)
    for epoch in range(1, epochs + 1):
        run.complete(report(epoch))
        run.undecided.clear()
    run.pinned.append("layers.0")
    run.requested = RequestAdaptation(site="layers.0", blueprint="bottleneck")
    run.paused, run.pauses, run.restarts, run.decisions, run.losses_in_a_row = True, 3, 2, epochs, 1
    state = run.to_state()
    assert len(state.losses) <= KEPT_LOSSES
    carried = TrainingState.model_validate_json(state.model_dump_json())
    assert carried == state
    later = RunProgress(TrainingRequest(run_id="r", config=run.config, state=carried))
    assert later.to_state() == state
    assert later.status("training", Outcome.RUNNING) == run.status("training", Outcome.RUNNING)
    assert later.orderable() == run.orderable()


def test_the_facts_of_a_run_do_not_travel() -> None:
    fact = Fact(run_id="r", adaptation_id="r/a1", kind=FactKind.STOP, apply_step=1, seq=1)
    run = progress()
    run.take_lease(LEASE, loaded(facts=(fact,)))
    state = run.to_state()
    assert state.loaded is not None
    assert state.loaded.facts == ()


def test_a_new_owner_learns_from_the_facts_what_its_predecessor_did() -> None:
    run = progress()
    run.adopt(
        KnownRun(
            record=RunRecord(run_id="r", name="r", config=run.config, outcome=Outcome.STOPPED, created="2030"),
            adaptations=(adaptation(AdaptationState.DELIVERED),),
        )
    )
    pending = run.book.get("r/a1")
    assert pending is not None
    assert pending.state is AdaptationState.ORDERED
    missed = Fact(run_id="r", adaptation_id="r/a1", kind=FactKind.MISSED, apply_step=30, seq=1, reason="no kernel")
    changed = run.take_lease(LEASE, loaded(facts=(missed,)))
    assert [(a.adaptation_id, a.state) for a in changed] == [("r/a1", AdaptationState.MISSED)]
    assert run.take_lease(LEASE, loaded(facts=(missed,))) == []


def test_epochs_that_are_trained_again_are_counted_once() -> None:
    run = progress(tamiyo={"policy": "none"})
    for epoch in (1, 2, 3):
        run.complete(report(epoch))
    run.take_lease(LEASE, loaded(1))
    assert run.orderable() == [2, 3]
    run.complete(report(2))
    assert [point.epoch for point in run.losses] == [1, 2]


def test_a_trainer_that_got_further_than_its_predecessor_is_no_loss_in_a_row() -> None:
    run = progress()
    run.losses_in_a_row = 5
    run.take_lease(LEASE, loaded())
    assert run.losses_in_a_row == 5
    run.take_lease(LEASE, loaded().model_copy(update={"step": 3}))
    assert run.losses_in_a_row == 0


def test_in_asap_mode_only_the_newest_report_is_decided_on() -> None:
    run = progress(delivery={"mode": "asap"})
    for epoch in (1, 2, 3):
        run.complete(report(epoch))
    assert list(run.undecided) == [3]
    assert run.orderable() == [4, 5]
    assert run.apply_step(3) is None


def test_nothing_follows_an_early_stop() -> None:
    run = progress()
    run.complete(report(1, stop=True))
    assert run.finished()
    assert run.orderable() == []
    assert run.undecided == {}


def test_a_request_makes_any_epoch_one_of_decision() -> None:
    run = progress(tamiyo={"policy": "none"})
    assert not run.expects_decision(3)
    run.requested = RequestAdaptation(site="layers.0", blueprint="bottleneck")
    assert run.expects_decision(3)
    assert run.decides(report(3))
    assert not run.expects_decision(20)


def test_a_hold_is_as_long_as_both_settings_ask() -> None:
    run = progress(tamiyo={"hold_epochs": 6, "hold_steps": 800})
    assert run.hold_window_steps(10) == 800
    assert run.hold_window_steps(200) == 1200


@given(st.text(max_size=700))
def test_a_summary_is_within_the_limit_of_the_server(text: str) -> None:
    assert len(clipped(text).encode()) <= 400


def test_the_table_of_a_run_survives_any_text() -> None:
    run = progress()
    nasty = adaptation(AdaptationState.FAILED).model_copy(update={"reason": "a|b\nc", "apply_step": None})
    text = details(run.status("training", Outcome.RUNNING), (nasty,))
    assert r"a\|b c" in text
    assert len(text.splitlines()) == 2 + 10 + 4


ELSEWHERE: SiteContract = SITE.model_copy(update={"site": "layers.9"})


@pytest.mark.parametrize(
    ("change", "sound"),
    [
        ({}, True),
        ({"kind": DecisionKind.WAIT, "site": None, "contract": None}, True),
        ({"seed": 999}, False),
        ({"seed": None}, False),
        ({"site": "layers.9", "contract": ELSEWHERE}, False),
        ({"contract": ELSEWHERE}, False),
        ({"contract": None}, False),
        ({"blueprint": None}, False),
        ({"epoch": 2}, False),
        ({"run_id": "other"}, False),
    ],
)
def test_a_decision_is_sound_or_says_what_is_wrong(change: dict[str, object], sound: bool) -> None:
    run = progress()
    request = ScoreRequest(
        run_id="r",
        tamiyo=run.config.tamiyo,
        max_epochs=20,
        steps_per_epoch=STEPS_PER_EPOCH,
        lag_epochs=1,
        hold_window_steps=20,
        report=report(1),
    )
    assert (flaw_of(growth().model_copy(update=change), request) is None) is sound
