"""However long a run lasts and however often it grows, its histories and what it carries along stay bounded (G1)."""

import asyncio
from dataclasses import dataclass
from datetime import timedelta

import pytest
from busy_world import BusyWorld
from execution_chain import MOST_BYTES
from execution_chain import MOST_EVENTS
from execution_chain import chain
from execution_chain import input_bytes
from execution_chain import size_bytes
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from workflow_stage import configuration
from workflow_stage import stage

from esper.contracts.enums import AdaptationState
from esper.contracts.enums import Outcome
from esper.contracts.operational import Adaptation
from esper.contracts.operational import Forgotten
from esper.contracts.orders import RunRecord
from esper.runtime.remembering import KEPT_ADAPTATIONS
from esper.runtime.remembering import remembered

MOST_CARRIED = 64 * 1024
"""Bytes that one execution hands to the next."""


@dataclass(frozen=True)
class Measured:
    """One run and the executions that it took."""

    record: RunRecord
    events: list[int]
    sizes: list[int]
    carried: list[int]


def measure(
    address: str, world: BusyWorld, epochs: int, frequency: int, limit: timedelta, parts: int | None = None
) -> Measured:
    async def scene() -> Measured:
        async with stage(address, world) as on:
            tamiyo = {"adaptation_frequency": frequency, "max_adaptations": 10_000}
            handle = await on.start(configuration(epochs, tamiyo=tamiyo), limit=limit, continue_after_epochs=parts)
            record = await handle.result()
            histories = await chain(on.client, handle.id)
        return Measured(
            record=record,
            events=[len(history.events) for history in histories],
            sizes=[size_bytes(history) for history in histories],
            carried=[input_bytes(history) for history in histories[1:]],
        )

    return asyncio.run(scene())


def check(world: BusyWorld, measured: Measured, epochs: int, grafts: int) -> None:
    assert measured.record.outcome is Outcome.COMPLETED
    assert [epoch for what, epoch in world.journal if what == "epoch"] == list(range(1, epochs + 1))
    last = {adaptation.adaptation_id: adaptation.state for adaptation in world.adaptations}
    assert len(last) == grafts
    assert set(last.values()) == {AdaptationState.CULLED, AdaptationState.FOSSILIZED}
    assert max(measured.events) <= MOST_EVENTS
    assert max(measured.sizes) <= MOST_BYTES
    assert max(measured.carried) <= MOST_CARRIED
    # What it carries has its full size well before the end.
    half = len(measured.carried) // 2
    assert max(measured.carried[half:]) <= 1.1 * max(measured.carried[: half + 1])


@pytest.mark.temporal
@pytest.mark.fault("G1")
def test_what_a_run_carries_along_does_not_grow(temporal_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esper.runtime.remembering.KEPT_ADAPTATIONS", 3)
    monkeypatch.setattr("esper.runtime.remembering.KEPT_LOSSES", 8)
    world = BusyWorld(grafts_wanted=8, keep_one_in=4)
    measured = measure(temporal_address, world, 40, 1, timedelta(minutes=4), parts=4)
    check(world, measured, 40, 8)
    assert len(measured.carried) >= 8
    assert world.most_seen <= 3 + 2


@pytest.mark.temporal
@pytest.mark.slow
@pytest.mark.fault("G1")
@pytest.mark.timeout(3600)
def test_ten_thousand_epochs_and_two_hundred_grafts(temporal_address: str) -> None:
    world = BusyWorld(grafts_wanted=200, epoch_seconds=0.001)
    measured = measure(temporal_address, world, 10_000, 40, timedelta(hours=1))
    check(world, measured, 10_000, 200)
    # The server alone says when a history is long enough.
    assert len(measured.carried) >= 10


STATES = st.lists(st.sampled_from([*AdaptationState]), max_size=3 * KEPT_ADAPTATIONS)


def adaptation(number: int, state: AdaptationState) -> Adaptation:
    return Adaptation(
        adaptation_id=f"r/a{number}",
        number=number,
        epoch=number,
        site="layers.0",
        seed=0,
        seed_generation=number - 1,
        blueprint="bottleneck",
        state=state,
        reason="because",
    )


@pytest.mark.fault("G1")
@given(STATES)
@settings(max_examples=200, deadline=None)
def test_nothing_is_forgotten_that_is_not_over_and_everything_is_counted(states: list[AdaptationState]) -> None:
    known = [adaptation(number, state) for number, state in enumerate(states, start=1)]
    kept, forgotten = remembered(known, Forgotten())
    assert len(kept) + forgotten.ordered == len(known)
    assert remembered(kept, forgotten) == (kept, forgotten)
    assert kept[-KEPT_ADAPTATIONS:] == tuple(known[-KEPT_ADAPTATIONS:])
    gone = {each.adaptation_id for each in known} - {each.adaptation_id for each in kept}
    over = {AdaptationState(name) for name in ("culled", "missed", "failed", "vetoed", "stale")}
    assert all(each.state in over for each in known if each.adaptation_id in gone)
    assert forgotten.culled == sum(each.state is AdaptationState.CULLED for each in known if each.adaptation_id in gone)
    # One after another, as a run orders them, ends in the same as all at once.
    step: tuple[Adaptation, ...] = ()
    tally = Forgotten()
    for each in known:
        step, tally = remembered([*step, each], tally)
    assert (step, tally) == (kept, forgotten)
