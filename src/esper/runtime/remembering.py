"""How much of its past a run's workflow keeps in mind: enough to decide as before, and bounded however long it lasts.

Urza holds everything. What a workflow remembers travels with every decision and every continue-as-new, so it must not
grow with the number of epochs or of adaptations.
"""

from collections.abc import Iterable
from collections.abc import Sequence

from esper.contracts.enums import AdaptationState
from esper.contracts.operational import Adaptation
from esper.contracts.operational import Fact
from esper.contracts.operational import Forgotten

KEPT_LOSSES = 64
"""Epochs of losses that a policy gets to see and that travel over continue-as-new."""

KEPT_ADAPTATIONS = 32
"""The newest adaptations, which are kept whole. Of the older ones what is not over stays, what is part of the model
stays without its evidence (there are no more of those than the model has seeds), and the rest is only counted."""

_GONE = frozenset(
    {
        AdaptationState.CULLED,
        AdaptationState.MISSED,
        AdaptationState.FAILED,
        AdaptationState.VETOED,
        AdaptationState.STALE,
    }
)


def remembered(adaptations: Iterable[Adaptation], forgotten: Forgotten) -> tuple[tuple[Adaptation, ...], Forgotten]:
    """What stays in mind of these adaptations, and the count of all that does not. Applied twice it is the same."""
    known = tuple(adaptations)
    newest = max((adaptation.number for adaptation in known), default=0)
    kept: list[Adaptation] = []
    ordered, culled = forgotten.ordered, forgotten.culled
    for adaptation in known:
        old = adaptation.number <= newest - KEPT_ADAPTATIONS
        if old and adaptation.state in _GONE:
            ordered += 1
            culled += adaptation.state is AdaptationState.CULLED
        elif old and adaptation.state is AdaptationState.FOSSILIZED:
            kept.append(adaptation.model_copy(update={"judge": None}))
        else:
            kept.append(adaptation)
    return tuple(kept), Forgotten(ordered=ordered, culled=culled)


def recent_facts(facts: Sequence[Fact]) -> tuple[Fact, ...]:
    """The facts about the newest adaptations, by `seq`: older ones come with the reports of their epochs."""
    subjects = list(dict.fromkeys(fact.adaptation_id for fact in facts))[-KEPT_ADAPTATIONS:]
    return tuple(fact for fact in facts if fact.adaptation_id in subjects)
