"""The book of adaptations: facts rule, in whatever order and however often news of them comes."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from book_entries import growth
from book_entries import kernel_for
from book_entries import report
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from esper.contracts.enums import AdaptationState
from esper.contracts.enums import DeliveryMode
from esper.contracts.enums import FactKind
from esper.contracts.enums import Verdict
from esper.contracts.operational import Fact
from esper.contracts.operational import JudgeReport
from esper.contracts.operational import KernelDelivery
from esper.workflows.adaptation_book import LIVE
from esper.workflows.adaptation_book import PENDING
from esper.workflows.adaptation_book import AdaptationBook

APPLY, JUDGE = 30, 50


def ordered(apply_step: int | None = APPLY) -> AdaptationBook:
    book = AdaptationBook()
    assert book.order("r", growth(), report(1), apply_step) is not None
    return book


def delivery(book: AdaptationBook, number: int = 1) -> KernelDelivery:
    adaptation = book.get(f"r/a{number}")
    assert adaptation is not None
    return kernel_for(adaptation)


def fact(kind: FactKind, step: int = APPLY, number: int = 1) -> Fact:
    return Fact(
        run_id="r",
        adaptation_id=f"r/a{number}",
        kind=kind,
        apply_step=step,
        seq=1,
        judge_step=JUDGE if kind is FactKind.GRAFT else None,
        reason=kind.value,
    )


def verdict(kind: Verdict) -> JudgeReport:
    return JudgeReport(run_id="r", adaptation_id="r/a1", verdict=kind, step=JUDGE, reason=kind.value)


def state(book: AdaptationBook) -> AdaptationState:
    adaptation = book.get("r/a1")
    assert adaptation is not None
    return adaptation.state


@pytest.mark.parametrize("missing", [{"site": None}, {"seed": None}, {"blueprint": None}])
def test_a_decision_that_names_no_growth_orders_none(missing: dict[str, object]) -> None:
    book = AdaptationBook()
    assert book.order("r", growth(**missing), report(1), APPLY) is None
    assert book.all() == ()


def test_one_decision_orders_once() -> None:
    book = ordered()
    assert book.order("r", growth(), report(1), APPLY) is None
    second = book.order("r", growth(2), report(2), 60)
    assert second is not None
    assert second.number == 2


def test_a_kernel_for_something_else_under_the_same_id_is_not_taken() -> None:
    book = ordered()
    sent = delivery(book)
    other = sent.model_copy(update={"adaptation": sent.adaptation.model_copy(update={"site": "layers.9"})})
    assert book.deliver(other) is None
    assert book.deliver(sent) is not None
    assert book.deliver(sent) is None
    assert book.deliveries() == (sent,)


@pytest.mark.parametrize("ended", [AdaptationState.VETOED, AdaptationState.FAILED, AdaptationState.STALE])
def test_a_recorded_graft_rules_over_what_was_believed(ended: AdaptationState) -> None:
    book = ordered()
    book.fail("r/a1", ended, "given up")
    assert book.accept(fact(FactKind.GRAFT)) is not None
    assert state(book) in PENDING
    assert book.apply(fact(FactKind.GRAFT)) is not None
    assert book.to_judge(JUDGE) == "r/a1"
    assert book.to_judge(JUDGE - 1) is None


@pytest.mark.parametrize("kind", [FactKind.FOSSILIZE, FactKind.CULL])
def test_the_fact_of_a_verdict_waits_for_its_report(kind: FactKind) -> None:
    book = ordered()
    book.apply(fact(FactKind.GRAFT))
    assert book.apply(fact(kind, JUDGE)) is None
    assert book.to_judge(JUDGE + 10) == "r/a1"
    found = Verdict.KEEP if kind is FactKind.FOSSILIZE else Verdict.CULL
    assert book.judge(verdict(found)) is not None
    assert state(book) is (AdaptationState.FOSSILIZED if found is Verdict.KEEP else AdaptationState.CULLED)
    assert book.to_judge(JUDGE + 10) is None


@pytest.mark.parametrize("kind", [FactKind.CULL, FactKind.QUARANTINE, FactKind.FOSSILIZE, FactKind.MISSED])
def test_what_was_kept_is_undone_by_a_person_alone(kind: FactKind) -> None:
    book = ordered()
    book.apply(fact(FactKind.GRAFT))
    book.judge(verdict(Verdict.KEEP))
    assert book.apply(fact(kind, JUDGE + 1)) is None
    assert state(book) is AdaptationState.FOSSILIZED
    assert book.apply(fact(FactKind.REMOVE, JUDGE + 1)) is not None
    assert state(book) is AdaptationState.CULLED


def test_a_void_verdict_over_a_graft_on_probation_ends_it() -> None:
    book = ordered()
    book.apply(fact(FactKind.GRAFT))
    book.judge(verdict(Verdict.VOID))
    assert state(book) is AdaptationState.CULLED


def test_in_scheduled_mode_only_steps_say_what_is_in_flight() -> None:
    book = ordered()
    assert book.in_flight(report(3), DeliveryMode.SCHEDULED) == "r/a1"
    book.fail("r/a1", AdaptationState.MISSED, "no kernel")
    assert book.in_flight(report(3), DeliveryMode.SCHEDULED) == "r/a1"
    assert book.in_flight(report(4), DeliveryMode.SCHEDULED) is None
    assert book.in_flight(report(3), DeliveryMode.ASAP) is None


def test_a_graft_on_probation_is_culled_before_one_that_was_kept() -> None:
    book = ordered()
    book.apply(fact(FactKind.GRAFT))
    book.judge(verdict(Verdict.KEEP))
    book.order("r", growth(5), report(5), 70)
    book.apply(fact(FactKind.GRAFT, 70, number=2))
    found = book.live_at("layers.0")
    assert found is not None
    assert found.number == 2
    assert book.live_count() == 2
    assert book.live_at("layers.1") is None


@pytest.mark.fault("C8")
@pytest.mark.parametrize("kind", [Verdict.KEEP, Verdict.CULL])
def test_a_decision_on_the_step_of_a_verdict_does_not_see_it_however_fast_it_was(kind: Verdict) -> None:
    book = ordered()
    book.apply(fact(FactKind.GRAFT))
    before = book.as_of(JUDGE)
    book.judge(verdict(kind))
    (seen,) = book.as_of(JUDGE)
    assert (seen.state, seen.judge) == (before[0].state, before[0].judge) == (AdaptationState.TRAINING, None)
    assert book.as_of(JUDGE + 1) == book.all() and state(book) is not AdaptationState.TRAINING


EVENTS = st.lists(
    st.sampled_from(
        [
            ("deliver", None),
            ("veto", None),
            ("accept", FactKind.GRAFT),
            *(("fact", kind) for kind in FactKind),
            *(("judge", kind) for kind in Verdict),
        ]
    ),
    max_size=12,
)


def play(events: Sequence[tuple[str, object]]) -> list[AdaptationState]:
    book = ordered()
    sent = delivery(book)
    states = [state(book)]
    for what, kind in events:
        if what == "deliver":
            book.deliver(sent)
        elif what == "veto":
            book.fail("r/a1", AdaptationState.VETOED, "no")
        elif what == "accept":
            book.accept(fact(FactKind.GRAFT))
        elif what == "judge" and isinstance(kind, Verdict):
            book.judge(verdict(kind))
        elif isinstance(kind, FactKind):
            book.apply(fact(kind, JUDGE if kind in (FactKind.FOSSILIZE, FactKind.CULL) else APPLY))
        assert book.deliveries() == (() if state(book) not in PENDING or sent not in book.deliveries() else (sent,))
        assert book.live_count() == (state(book) in LIVE)
        states.append(state(book))
    return states


@given(EVENTS)
@settings(max_examples=300, deadline=None)
def test_what_was_grafted_and_ended_stays_so(events: list[tuple[str, object]]) -> None:
    for (before, after), event in zip(pairwise(play(events)), events, strict=True):
        if before is AdaptationState.CULLED:
            assert after is before
        if before is AdaptationState.FOSSILIZED:
            assert after is (AdaptationState.CULLED if event == ("fact", FactKind.REMOVE) else before)


@given(EVENTS)
@settings(max_examples=300, deadline=None)
def test_news_that_comes_twice_is_news_once(events: list[tuple[str, object]]) -> None:
    doubled = [event for event in events for _ in range(2)]
    assert play(doubled)[-1] is play(events)[-1]


@given(EVENTS)
@settings(max_examples=200, deadline=None)
def test_a_graft_in_the_model_is_judged_or_has_ended(events: list[tuple[str, object]]) -> None:
    book = ordered()
    for what, kind in [*events, ("fact", FactKind.GRAFT)]:
        if what == "fact" and isinstance(kind, FactKind):
            book.apply(fact(kind, JUDGE if kind in (FactKind.FOSSILIZE, FactKind.CULL) else APPLY))
        elif what == "veto":
            book.fail("r/a1", AdaptationState.VETOED, "no")
    assert (book.to_judge(JUDGE) is not None) == (state(book) is AdaptationState.TRAINING)
    assert state(book) not in PENDING
