"""The protocol of leases, facts, heads and deliveries under arbitrary interleavings of crashes and late messages.

Five bugs that the protocol exists to exclude are put back one at a time, and must be found.
"""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck
from hypothesis import Phase
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from memory_urza import MemoryUrza
from protocol_bugs import CheckThenWrite
from protocol_bugs import EarlyAcknowledgement
from protocol_bugs import NoDedup
from protocol_bugs import NoFence
from protocol_bugs import NoGeneration
from protocol_lineage import Violation
from protocol_machine import Protocol
from protocol_world import stand_ins

from esper.contracts.enums import FactKind
from esper.errors import DatabaseUnavailable
from esper.runtime.tolaria.live import deliveries

QUIET = list(HealthCheck)


def play(kind: type[Protocol], urza: MemoryUrza, examples: int) -> None:
    """Derandomized: the same examples every time, none kept between runs."""
    chosen = settings(
        max_examples=examples,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=QUIET,
        phases=(Phase.generate,),
        report_multiple_bugs=False,
    )
    run_state_machine_as_test(lambda: kind(urza), settings=chosen)


@pytest.fixture(scope="module")
def urza() -> Iterator[MemoryUrza]:
    memory = MemoryUrza()
    with stand_ins():
        yield memory
    memory.close()


@pytest.mark.fault("F1", "F2", "F3", "F5", "I1", "I2", "I3", "I4", "I6", "I8", "I9", "I10")
def test_no_interleaving_breaks_the_protocol(urza: MemoryUrza) -> None:
    play(Protocol, urza, 30)


@pytest.mark.slow
@pytest.mark.fault("F1", "F2", "F3", "F5", "I1", "I2", "I3", "I4", "I6", "I8", "I9", "I10")
def test_no_interleaving_of_many_breaks_the_protocol(urza: MemoryUrza) -> None:
    play(Protocol, urza, 500)


@pytest.mark.fault("F1", "F2", "F3", "I9")
@pytest.mark.parametrize(
    ("bug", "broken"),
    [
        (NoFence, "I9"),
        (CheckThenWrite, "I9"),
        (NoDedup, "I2|I8"),
        (NoGeneration, "I3"),
        (EarlyAcknowledgement, "I4"),
    ],
)
def test_a_bug_that_is_put_back_is_found(urza: MemoryUrza, bug: type[Protocol], broken: str) -> None:
    with pytest.raises(Violation, match=broken):
        play(bug, urza, 200)


def running(urza: MemoryUrza, kind: type[Protocol] = Protocol) -> Protocol:
    """A run whose first epoch is over, with one trainer."""
    machine = kind(urza)
    machine.begin()
    return machine


@pytest.mark.fault("F3", "I4")
@pytest.mark.parametrize("what", ["install", "abandon", "cull"])
def test_a_fact_whose_answer_is_lost_ends_its_session(urza: MemoryUrza, what: str) -> None:
    """Found by the machine: the session went on past the step of a fact that stood, and no later owner could load."""
    machine = running(urza)
    (trainer,) = machine.trainers
    assert trainer.shared is not None
    assert trainer.run is not None
    machine.order(site="first", lag=0, asap=True, delivered=what == "cull")
    (delivery,) = machine.sent
    if what == "cull":
        while trainer.run.state.held is None:
            assert machine.advance(trainer, impatient=False)
        machine.finish_commit(trainer)
    machine.check()
    trainer.store.lose_answer = True
    orders = {
        "install": lambda shared: deliveries.install(shared, delivery),
        "abandon": lambda shared: deliveries.abandon(shared, delivery.adaptation, "no kernel"),
        "cull": lambda shared: deliveries.remove(shared, delivery.adaptation.adaptation_id),
    }
    with pytest.raises(DatabaseUnavailable):
        orders[what](trainer.shared)
    with pytest.raises(DatabaseUnavailable):
        machine.advance(trainer, impatient=True)
    machine.check()
    machine.teardown()


@pytest.mark.fault("F5", "I8")
@pytest.mark.parametrize("sites", [("first", "second"), ("first", "first")])
def test_of_two_kernels_that_are_recorded_at_once_one_is_grafted(urza: MemoryUrza, sites: tuple[str, str]) -> None:
    """Both were grafted at one step before: the later one took the earlier one's place on probation, and nobody would
    ever have judged that."""
    machine = running(urza)
    (trainer,) = machine.trainers
    for site in (sites[0], "first", sites[1]):
        machine.order(site=site, lag=0, asap=True, delivered=False)
    first, _, second = machine.sent
    trainer.store.meanwhile = lambda: machine.deliver(trainer, second)
    machine.deliver(trainer, first)
    outcomes = {fact.adaptation_id.rpartition("/")[2]: fact for fact in urza.facts(machine.run_id)}
    assert (outcomes["a1"].kind, outcomes["a3"].kind) == (FactKind.GRAFT, FactKind.MISSED)
    assert "is being grafted" in outcomes["a3"].reason
    machine.check()
    machine.teardown()
