"""What the seeds of a run must be, told from its executed facts alone."""

from protocol_world import REMOVAL_STEPS
from protocol_world import SITES
from protocol_world import TOTAL_STEPS
from protocol_world import moved

from esper.contracts.assets import Seed
from esper.contracts.enums import FactKind
from esper.contracts.enums import SeedState
from esper.contracts.operational import Fact


class Violation(AssertionError):
    """An invariant of the protocol does not hold."""


def lineage(executed: tuple[Fact, ...], step: int) -> dict[str, Seed]:
    """The seeds after these facts up to `step`, told from the facts alone.

    Raises `Violation` for an adaptation that is applied twice (I2), one that is applied to another generation of its
    seed (I3), and `GrowthError` for a move that is not legal (I6).
    """
    seeds = {site: Seed(site=site, index=0) for site in SITES}
    leaving: dict[str, int] = {}
    done: set[tuple[str, str]] = set()

    def leave(now: int) -> None:
        for site in [site for site, end in leaving.items() if end <= now]:
            seeds[site] = moved(seeds[site], SeedState.CULLED, SeedState.DORMANT)
            del leaving[site]

    for fact in executed:
        leave(fact.apply_step)
        site = fact.site
        assert site is not None
        if (fact.adaptation_id, fact.decides) in done:
            raise Violation(f"I2: {fact.kind} of {fact.adaptation_id} was executed twice")
        done.add((fact.adaptation_id, fact.decides))
        if fact.kind is FactKind.GRAFT:
            assert fact.delivery is not None
            wanted = fact.delivery.adaptation.seed_generation
            if wanted != seeds[site].generation:
                raise Violation(f"I3: a kernel for generation {wanted} was grafted into {seeds[site]}")
            grown = (SeedState.GERMINATED, SeedState.TRAINING, SeedState.GRAFTING)
            seeds[site] = moved(seeds[site], *grown, adaptation_id=fact.adaptation_id)
        elif fact.kind is FactKind.FOSSILIZE:
            seeds[site] = moved(seeds[site], SeedState.FOSSILIZED)
        elif fact.kind is FactKind.CULL:
            seeds[site] = moved(seeds[site], SeedState.CULLED, SeedState.DORMANT)
        elif fact.kind is FactKind.REMOVE and seeds[site].adaptation_id == fact.adaptation_id:
            leaving.setdefault(site, min(fact.apply_step + REMOVAL_STEPS, TOTAL_STEPS))
    leave(step)
    return seeds
