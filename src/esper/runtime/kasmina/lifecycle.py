"""The life of a seed as one table: what may follow what. Anything else raises."""

from collections.abc import Mapping
from types import MappingProxyType

from esper.contracts.enums import SeedState
from esper.errors import GrowthError

TRANSITIONS: Mapping[SeedState, frozenset[SeedState]] = MappingProxyType(
    {
        SeedState.DORMANT: frozenset({SeedState.GERMINATED}),
        SeedState.GERMINATED: frozenset({SeedState.TRAINING, SeedState.CULLED, SeedState.ERROR_RECOVERY}),
        SeedState.TRAINING: frozenset({SeedState.GRAFTING, SeedState.CULLED, SeedState.ERROR_RECOVERY}),
        SeedState.GRAFTING: frozenset({SeedState.FOSSILIZED, SeedState.CULLED, SeedState.ERROR_RECOVERY}),
        SeedState.ERROR_RECOVERY: frozenset({SeedState.TRAINING, SeedState.GRAFTING, SeedState.CULLED}),
        SeedState.FOSSILIZED: frozenset({SeedState.CULLED}),
        SeedState.CULLED: frozenset({SeedState.DORMANT}),
    }
)
"""Legal moves. `FOSSILIZED` is the end, but for a person's cull of a block that was not folded; a `CULLED` seed becomes
`DORMANT` again with the next generation."""

LIVE = frozenset({SeedState.TRAINING, SeedState.GRAFTING, SeedState.ERROR_RECOVERY})
"""The states in which a seed has a kernel that may still be removed."""

REMOVABLE = LIVE | {SeedState.FOSSILIZED}
"""The states whose block a person may still cull; a folded block is no block any more."""


def advance(state: SeedState, to: SeedState) -> SeedState:
    """Return `to` if a seed in `state` may move there. Raises GrowthError ESP-437 if it may not."""
    if to not in TRANSITIONS[state]:
        legal = ", ".join(sorted(following.value for following in TRANSITIONS[state]))
        raise GrowthError("ESP-437", f"a seed that is {state} cannot become {to}", hint=f"what may follow: {legal}")
    return to
