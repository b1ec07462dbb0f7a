"""The facts of a run as its trainer keeps them: what is recorded, what is expected, what is due at a step."""

from collections.abc import Iterable
from dataclasses import dataclass

from esper.contracts.enums import FactKind
from esper.contracts.operational import Fact
from esper.contracts.operational import ScheduledAdaptation
from esper.errors import IntegrityError
from esper.runtime.tolaria.live.run_state import RunState

_CHANGES = frozenset(FactKind) - {FactKind.MISSED, FactKind.STOP}
"""Facts that change the model: one of these that a checkpoint beyond it lacks can never be made good."""


@dataclass(frozen=True)
class Expected:
    """A scheduled adaptation whose apply step has come, and nothing is recorded of it."""

    adaptation: ScheduledAdaptation


@dataclass(frozen=True)
class Unresolved:
    """A fact for this step is being recorded right now."""

    adaptation_id: str


class FactBook:
    """Plain data; whoever calls holds the session's lock."""

    def __init__(self, facts: Iterable[Fact] = (), frontier: int = 0) -> None:
        self._facts: dict[tuple[str, str], Fact] = {}
        self._expected: dict[str, ScheduledAdaptation] = {}
        self._unresolved: dict[str, int] = {}
        self._grafting: str | None = None
        self._frontier = frontier
        for fact in facts:
            self.record(fact)

    @property
    def frontier(self) -> int:
        """The highest step of any fact, report or head: a step that is newly chosen lies beyond it."""
        return self._frontier

    def advance_frontier(self, step: int) -> None:
        self._frontier = max(self._frontier, step)

    def all(self) -> tuple[Fact, ...]:
        """Every recorded fact, by `seq`."""
        return tuple(sorted(self._facts.values(), key=lambda fact: fact.seq))

    def record(self, fact: Fact) -> None:
        """A fact stands in the ledger."""
        self._facts[fact.adaptation_id, fact.name] = fact
        self.advance_frontier(fact.apply_step)

    def find(self, adaptation_id: str, *kinds: FactKind) -> Fact | None:
        """The first recorded fact of the adaptation among `kinds`, of which strikes are none."""
        names = (kind.value for kind in kinds)
        return next((self._facts[adaptation_id, name] for name in names if (adaptation_id, name) in self._facts), None)

    def delivery(self, adaptation_id: str) -> Fact | None:
        """The fact that ruled over the delivery: a graft, or a missed one."""
        return self.find(adaptation_id, FactKind.GRAFT, FactKind.MISSED)

    def expect(self, schedule: Iterable[ScheduledAdaptation]) -> None:
        """These adaptations may be delivered; training does not pass their apply step without a fact."""
        for adaptation in schedule:
            self._expected[adaptation.adaptation_id] = adaptation

    def expected(self) -> tuple[ScheduledAdaptation, ...]:
        """What is scheduled and has no fact yet."""
        return tuple(item for key, item in self._expected.items() if self.delivery(key) is None)

    def reserve(self, adaptation_id: str, step: int, *, graft: bool = False) -> None:
        """From now until `release`, training does not pass `step`: a fact for it, or a `graft`, is being recorded."""
        self._unresolved[adaptation_id] = step
        if graft:
            self._grafting = adaptation_id

    def release(self, adaptation_id: str) -> None:
        self._unresolved.pop(adaptation_id, None)
        if self._grafting == adaptation_id:
            self._grafting = None

    @property
    def grafting(self) -> str | None:
        """The adaptation whose graft is being recorded right now."""
        return self._grafting

    def pending_graft(self, state: RunState) -> Fact | None:
        """A recorded graft that is yet to be made."""
        grafts = (fact for fact in self._facts.values() if fact.kind is FactKind.GRAFT)
        return next((fact for fact in grafts if not state.has_executed(fact)), None)

    def due(self, step: int, state: RunState) -> Fact | Expected | Unresolved | None:
        """What must happen at this boundary before the next step is taken, one thing at a time."""
        facts = [fact for fact in self._facts.values() if fact.apply_step == step and not state.has_executed(fact)]
        if facts:
            return min(facts, key=lambda fact: fact.seq)
        for adaptation_id, reserved in self._unresolved.items():
            if reserved <= step:
                return Unresolved(adaptation_id)
        for adaptation in self.expected():
            if adaptation.apply_step is not None and adaptation.apply_step <= step:
                return Expected(adaptation)
        return None


def check_ledger(facts: Iterable[Fact], state: RunState, step: int, run_id: str) -> None:
    """A change recorded below the head must be in the head's ledger. Raises `IntegrityError` (ESP-409)."""
    for fact in facts:
        if fact.apply_step < step and fact.kind in _CHANGES and not state.has_executed(fact):
            raise IntegrityError(
                "ESP-409",
                f"run {run_id}: {fact.kind} of {fact.adaptation_id} is recorded for step {fact.apply_step}, but the "
                f"head at step {step} was made without it",
                hint="The head or the ledger was damaged or restored from elsewhere; nothing was overwritten",
                run_id=run_id,
            )
