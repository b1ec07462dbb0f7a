"""The adaptations of a run as its workflow keeps them: pure data, no commands."""

from collections.abc import Iterable

from esper.contracts.enums import STATE_AFTER
from esper.contracts.enums import AdaptationState
from esper.contracts.enums import DeliveryMode
from esper.contracts.enums import FactKind
from esper.contracts.enums import Verdict
from esper.contracts.operational import Adaptation
from esper.contracts.operational import AdaptationDecision
from esper.contracts.operational import EpochReport
from esper.contracts.operational import Fact
from esper.contracts.operational import Forgotten
from esper.contracts.operational import JudgeReport
from esper.contracts.operational import KernelDelivery
from esper.contracts.operational import ScheduledAdaptation
from esper.runtime.remembering import remembered

PENDING = frozenset({AdaptationState.ORDERED, AdaptationState.DELIVERED})
"""Ordered, and its outcome at the apply step not yet known."""

LIVE = frozenset({AdaptationState.TRAINING, AdaptationState.FOSSILIZED})
"""Its kernel is part of the model."""

_GRAFTED = frozenset({AdaptationState.TRAINING, AdaptationState.FOSSILIZED, AdaptationState.CULLED})
_UNDECIDED = PENDING | {AdaptationState.TRAINING}

_ENDED_FROM = {FactKind.REMOVE: LIVE, FactKind.QUARANTINE: _UNDECIDED}
"""A person may also cull what was kept; a quarantine comes before the graft is made."""

_VERDICTS = frozenset({FactKind.FOSSILIZE, FactKind.CULL})


class AdaptationBook:
    """Orders, deliveries and outcomes by adaptation id, in the order of decision; what ended long ago is forgotten."""

    def __init__(
        self,
        adaptations: Iterable[Adaptation] = (),
        deliveries: Iterable[KernelDelivery] = (),
        forgotten: Forgotten | None = None,
    ) -> None:
        self.forgotten = forgotten or Forgotten()
        self._adaptations = {adaptation.adaptation_id: adaptation for adaptation in adaptations}
        self._deliveries = {delivery.adaptation.adaptation_id: delivery for delivery in deliveries}

    def all(self) -> tuple[Adaptation, ...]:
        return tuple(self._adaptations.values())

    def as_of(self, step: int) -> tuple[Adaptation, ...]:
        """All, as a decision on a report of this step may see them: a verdict is taken beside that decision, and
        which of both is faster must not count."""
        return tuple(
            adaptation.model_copy(update={"state": AdaptationState.TRAINING, "judge": None})
            if adaptation.judge is not None
            and adaptation.judge.verdict is not Verdict.VOID
            and adaptation.judge_step is not None
            and adaptation.judge_step >= step
            else adaptation
            for adaptation in self._adaptations.values()
        )

    def deliveries(self) -> tuple[KernelDelivery, ...]:
        """The deliveries that no fact answers yet."""
        return tuple(d for key, d in self._deliveries.items() if self._adaptations[key].state in PENDING)

    def get(self, adaptation_id: str) -> Adaptation | None:
        return self._adaptations.get(adaptation_id)

    def ordered_at(self, epoch: int) -> Adaptation | None:
        """What the decision on this epoch's report ordered: one decision orders once, however often it is read."""
        return next((adaptation for adaptation in self._adaptations.values() if adaptation.epoch == epoch), None)

    def order(
        self, run_id: str, decision: AdaptationDecision, report: EpochReport, apply_step: int | None
    ) -> Adaptation | None:
        """Enter what a decision orders; the number counts all adaptations of the run from 1.

        `None` when it names no site, seed and blueprint, or when it was entered before.
        """
        if decision.site is None or decision.seed is None or decision.blueprint is None:
            return None
        if self.ordered_at(decision.epoch) is not None:
            return None
        number = max((adaptation.number for adaptation in self._adaptations.values()), default=0) + 1
        adaptation = Adaptation(
            adaptation_id=f"{run_id}/a{number}",
            number=number,
            epoch=decision.epoch,
            site=decision.site,
            seed=decision.seed,
            seed_generation=_generation(report, decision.site, decision.seed),
            blueprint=decision.blueprint,
            hyperparameters=decision.hyperparameters,
            apply_step=apply_step,
            state=AdaptationState.ORDERED,
            reason=decision.reason,
        )
        # Here and nowhere else, so that what a decision sees does not depend on when a history ended.
        kept, self.forgotten = remembered([*self._adaptations.values(), adaptation], self.forgotten)
        self._adaptations = {each.adaptation_id: each for each in kept}
        self._deliveries = {key: sent for key, sent in self._deliveries.items() if key in self._adaptations}
        return adaptation

    def deliver(self, delivery: KernelDelivery) -> Adaptation | None:
        """Take a kernel in; `None` when nothing waits for exactly this (late, repeated, vetoed, unknown)."""
        adaptation = self._adaptations.get(delivery.adaptation.adaptation_id)
        if adaptation is None or adaptation.state is not AdaptationState.ORDERED:
            return None
        if delivery.adaptation != scheduled(adaptation):
            return None
        self._deliveries[adaptation.adaptation_id] = delivery
        return self._change(adaptation, state=AdaptationState.DELIVERED, kernel=delivery.kernel)

    def came_before(self, delivery: KernelDelivery) -> bool:
        """Whether this kernel was taken in for the same adaptation once already."""
        adaptation = self._adaptations.get(delivery.adaptation.adaptation_id)
        return adaptation is not None and adaptation.kernel == delivery.kernel

    def fail(self, adaptation_id: str, state: AdaptationState, reason: str) -> Adaptation | None:
        """End a pending adaptation that will not be grafted; `None` when it is not pending."""
        adaptation = self._adaptations.get(adaptation_id)
        if adaptation is None or adaptation.state not in PENDING:
            return None
        return self._change(adaptation, state=state, reason=reason)

    def accept(self, fact: Fact) -> Adaptation | None:
        """A graft is recorded for its step: it will be made, whatever was believed of it before."""
        adaptation = self._adaptations.get(fact.adaptation_id)
        if adaptation is None or adaptation.state in _GRAFTED:
            return None
        state = adaptation.state if adaptation.state in PENDING else AdaptationState.DELIVERED
        if (adaptation.state, adaptation.judge_step) == (state, fact.judge_step):
            return None
        return self._change(
            adaptation,
            state=state,
            kernel=_kernel(fact, adaptation),
            apply_step=fact.apply_step,
            judge_step=fact.judge_step,
        )

    def apply(self, fact: Fact) -> Adaptation | None:
        """A fact rules; `None` when it changes nothing that the book does not know already.

        The fact of a verdict waits for its report, which says why: `judge` brings both.
        """
        adaptation = self._adaptations.get(fact.adaptation_id)
        state = STATE_AFTER.get(fact.kind)
        if adaptation is None or state is None:
            return None
        if fact.kind is FactKind.GRAFT:
            if adaptation.state in _GRAFTED:
                return None
            return self._change(
                adaptation,
                state=state,
                kernel=_kernel(fact, adaptation),
                apply_step=fact.apply_step,
                judge_step=fact.judge_step,
            )
        if fact.kind is FactKind.MISSED:
            return self.fail(fact.adaptation_id, state, fact.reason or adaptation.reason)
        if adaptation.state not in _ENDED_FROM.get(fact.kind, {AdaptationState.TRAINING}):
            return None
        if fact.kind in _VERDICTS and fact.apply_step == adaptation.judge_step and adaptation.judge is None:
            return None
        return self._change(adaptation, state=state, reason=fact.reason or adaptation.reason)

    def judge(self, verdict: JudgeReport) -> Adaptation | None:
        """The verdict over a graft on probation; over one that has ended otherwise it is only noted."""
        adaptation = self._adaptations.get(verdict.adaptation_id)
        if adaptation is None or adaptation.judge is not None:
            return None
        if adaptation.state not in _UNDECIDED:
            return self._change(adaptation, judge=verdict)
        state = AdaptationState.FOSSILIZED if verdict.verdict is Verdict.KEEP else AdaptationState.CULLED
        return self._change(adaptation, state=state, judge=verdict, reason=verdict.reason)

    def in_flight(self, report: EpochReport, mode: DeliveryMode) -> str | None:
        """The adaptation that a decision on this report must wait for.

        In scheduled mode this looks at steps alone, never at whether a kernel happens to be there yet, so
        that the decision does not depend on how fast a forge was.
        """
        for adaptation in self._adaptations.values():
            if mode is DeliveryMode.SCHEDULED:
                if adaptation.apply_step is not None and adaptation.apply_step >= report.step:
                    return adaptation.adaptation_id
            elif adaptation.state in PENDING:
                return adaptation.adaptation_id
        return None

    def schedule(self) -> tuple[ScheduledAdaptation, ...]:
        """What a trainer must expect: all that is pending."""
        return tuple(scheduled(a) for a in self._adaptations.values() if a.state in PENDING)

    def to_judge(self, step: int) -> str | None:
        """The graft whose hold has ended by now, and of which no verdict is known."""
        for adaptation in self._adaptations.values():
            if (
                adaptation.judge is None
                and adaptation.state is AdaptationState.TRAINING
                and adaptation.judge_step is not None
                and adaptation.judge_step <= step
            ):
                return adaptation.adaptation_id
        return None

    def live_at(self, site: str) -> Adaptation | None:
        """The newest live adaptation at a site; one on probation before one that was kept."""
        live = [a for a in reversed(self._adaptations.values()) if a.site == site and a.state in LIVE]
        return next((a for a in live if a.state is AdaptationState.TRAINING), live[0] if live else None)

    def pending(self) -> Adaptation | None:
        for adaptation in self._adaptations.values():
            if adaptation.state in PENDING:
                return adaptation
        return None

    def live_count(self) -> int:
        return sum(adaptation.state in LIVE for adaptation in self._adaptations.values())

    def _change(self, adaptation: Adaptation, **changes: object) -> Adaptation:
        changed = adaptation.model_copy(update=changes)
        self._adaptations[changed.adaptation_id] = changed
        return changed


def scheduled(adaptation: Adaptation) -> ScheduledAdaptation:
    """An adaptation as trainer and forge must know it."""
    return ScheduledAdaptation(
        adaptation_id=adaptation.adaptation_id,
        number=adaptation.number,
        site=adaptation.site,
        seed=adaptation.seed,
        seed_generation=adaptation.seed_generation,
        blueprint=adaptation.blueprint,
        hyperparameters=adaptation.hyperparameters,
        decided_epoch=adaptation.epoch,
        apply_step=adaptation.apply_step,
    )


def _kernel(fact: Fact, adaptation: Adaptation) -> str | None:
    return fact.delivery.kernel if fact.delivery is not None else adaptation.kernel


def _generation(report: EpochReport, site: str, index: int) -> int:
    for node in report.graph.nodes:
        if node.contract.site == site:
            for seed in node.seeds:
                if seed.index == index:
                    return seed.generation
    return 0
