"""Pure functions: schedule, sampler, split, verdict, early stopping, ramps, ledger."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts.config import EarlyStopConfig
from esper.contracts.config import ScheduleConfig
from esper.contracts.enums import FactKind
from esper.contracts.enums import Verdict
from esper.contracts.operational import Fact
from esper.contracts.operational import ScheduledAdaptation
from esper.runtime.tolaria.evaluation import judge_chunks
from esper.runtime.tolaria.evaluation import split_validation
from esper.runtime.tolaria.judging import judge
from esper.runtime.tolaria.judging import student_quantile
from esper.runtime.tolaria.live.facts import Expected
from esper.runtime.tolaria.live.facts import FactBook
from esper.runtime.tolaria.live.facts import Unresolved
from esper.runtime.tolaria.live.run_state import EarlyStop
from esper.runtime.tolaria.live.run_state import Ramp
from esper.runtime.tolaria.live.run_state import RunState
from esper.runtime.tolaria.live.run_state import watch
from esper.runtime.tolaria.sampler import epoch_permutation
from esper.runtime.tolaria.schedule import Schedule

schedules = st.builds(
    Schedule,
    st.builds(
        ScheduleConfig,
        name=st.sampled_from(["constant", "cosine", "linear"]),
        warmup=st.floats(0, 0.9),
    ),
    st.integers(1, 10_000),
)


@given(schedules)
def test_schedule_is_positive_never_above_one_and_falls_after_the_warm_up(schedule):
    steps = range(0, schedule.total_steps, max(1, schedule.total_steps // 50))
    factors = [schedule.factor(step) for step in steps]
    assert all(0 < factor <= 1 for factor in factors)
    after = [factor for step, factor in zip(steps, factors, strict=True) if step >= schedule.warmup_steps]
    assert after == sorted(after, reverse=True)


def test_warm_up_ends_at_the_base_rate():
    schedule = Schedule(ScheduleConfig(name="cosine", warmup=0.1), 100)
    assert schedule.factor(0) == 0.1 and schedule.factor(9) == 1.0 and schedule.factor(10) == 1.0
    assert schedule.factor(99) < 0.001


@given(st.integers(1, 300), st.integers(0, 2**31 - 1), st.integers(0, 1_000_000))
def test_every_row_is_used_exactly_once_an_epoch(rows, seed, epoch):
    before = torch.get_rng_state()
    order = epoch_permutation(rows, seed, epoch)
    assert sorted(order.tolist()) == list(range(rows))
    assert torch.equal(torch.get_rng_state(), before)


def test_epochs_and_seeds_have_their_own_order():
    orders = {tuple(epoch_permutation(50, seed, epoch).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(st.integers(2, 2000))
def test_a_third_of_the_validation_is_reported_and_the_rest_judges(rows):
    reported, judged = split_validation(rows)
    assert sorted([*reported.tolist(), *judged.tolist()]) == list(range(rows))
    assert len(reported) == (rows + 2) // 3
    chunks = judge_chunks(judged)
    assert torch.equal(torch.cat(chunks), judged) and all(len(chunk) for chunk in chunks)


def test_student_quantiles_are_those_of_the_tables():
    known = {1: 6.314, 2: 2.920, 5: 2.015, 6: 1.943, 7: 1.895, 10: 1.812, 15: 1.753, 30: 1.697, 120: 1.658}
    for degrees, value in known.items():
        assert student_quantile(degrees) == pytest.approx(value, abs=0.002)


losses = st.lists(st.tuples(st.floats(0.01, 10), st.floats(0.01, 10)), min_size=2, max_size=20)


@given(losses, st.floats(0, 0.5))
def test_kept_only_when_the_lower_bound_exceeds_the_margin(pairs, margin):
    grown, twin = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    verdict = judge(grown, twin, margin)
    gains = [b - a for a, b in pairs]
    assert verdict.lower_bound <= statistics.fmean(gains) + 1e-12
    assert (verdict.verdict is Verdict.KEEP) == (verdict.lower_bound > margin * statistics.fmean(twin))
    assert verdict.chunks == len(pairs)


def test_clear_gain_is_kept_and_a_null_graft_is_not():
    twin = [1.0, 1.1, 0.9, 1.0]
    assert judge([0.5, 0.6, 0.4, 0.5], twin, 0.02).verdict is Verdict.KEEP
    assert judge([0.99, 1.09, 0.89, 0.99], twin, 0.02).verdict is Verdict.CULL
    assert judge(twin, twin, 0.0).verdict is Verdict.CULL


def test_losses_that_are_not_finite_decide():
    assert judge([math.nan, 1.0], [1.0, 1.0], 0.02).verdict is Verdict.CULL
    assert judge([1.0, 1.0], [math.inf, 1.0], 0.02).verdict is Verdict.KEEP
    assert judge([0.1], [1.0], 0.02).verdict is Verdict.CULL


def test_early_stopping_waits_for_its_patience_and_for_a_graft_on_probation():
    config = EarlyStopConfig(metric="val_loss", patience=2)
    state = EarlyStop()
    for epoch, value in enumerate([1.0, 0.9, 0.95, 0.91], start=1):
        state = watch(state, config, value, epoch, held=epoch == 4)
    assert state == EarlyStop(best=0.9, best_epoch=2)
    assert watch(state, config, 0.9, 5, held=False).stopped_epoch == 5
    assert watch(state, config, 0.8, 5, held=False).best == 0.8


def test_ramp_falls_from_one_to_zero():
    ramp = Ramp(adaptation_id="r/a1", site="a", seed=0, start_step=10, end_step=14)
    assert [ramp.alpha(step) for step in range(10, 16)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def fact(kind=FactKind.GRAFT, step=5, seq=1, number=1):
    return Fact(run_id="r", adaptation_id=f"r/a{number}", kind=kind, apply_step=step, seq=seq, site="a", seed=0)


def order(number=1, step=5):
    return ScheduledAdaptation(
        adaptation_id=f"r/a{number}",
        number=number,
        site="a",
        seed=0,
        seed_generation=0,
        blueprint="widen",
        hyperparameters={},
        decided_epoch=1,
        apply_step=step,
    )


def test_facts_of_a_boundary_are_due_by_seq_and_only_once():
    second, first = fact(FactKind.REMOVE, seq=2, number=2), fact(FactKind.GRAFT, seq=1)
    book = FactBook([second, first])
    state = RunState()
    assert book.due(4, state) is None
    assert book.due(5, state) == first
    state = state.model_copy(update={"executed": (first,)})
    assert book.due(5, state) == second
    assert book.due(5, state.model_copy(update={"executed": (first, second)})) is None


def test_boundary_is_not_passed_before_a_reserved_or_a_scheduled_step_is_resolved():
    book = FactBook(frontier=3)
    book.reserve("r/a1", 5)
    assert book.due(4, RunState()) is None
    assert book.due(5, RunState()) == Unresolved("r/a1")
    book.release("r/a1")
    assert book.due(5, RunState()) is None
    book.expect([order(2, 6)])
    assert book.due(6, RunState()) == Expected(order(2, 6))
    book.record(fact(FactKind.MISSED, 6, number=2))
    assert book.due(6, RunState()) == fact(FactKind.MISSED, 6, number=2)
    assert book.frontier == 6 and book.expected() == ()
