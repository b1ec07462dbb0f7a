"""All cases of the suite: host x blueprint x initialiser x optimizer, out of the registries."""

from collections.abc import Iterable
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from benchmarks.mechanics.hosts import HOSTS
from benchmarks.mechanics.hosts import Host
from benchmarks.mechanics.optimizers import OPTIMIZERS
from benchmarks.mechanics.optimizers import OptimizerCase

from esper.contracts.assets import SiteContract
from esper.errors import GrowthError
from esper.runtime.kasmina.growing.fitting import site_contract
from esper.runtime.tezzeret.blueprints.registry import list_blueprints
from esper.runtime.tezzeret.initialisers import list_initialisers

LIBRARY = "library"
"""In place of an initialiser: `esper.graft` as a user calls it, which builds, certifies and grafts by itself."""


@dataclass(frozen=True)
class Case:
    """One kernel to be grafted."""

    host: Host
    blueprint: str
    initialiser: str
    optimizer: OptimizerCase

    @property
    def name(self) -> str:
        return f"{self.host.name}, {self.blueprint}, {self.initialiser}, {self.optimizer.name}"


@cache
def fitting(host: Host, blueprint: str) -> SiteContract | None:
    """The contract of a kernel of this blueprint at this host's site, None where it does not fit."""
    try:
        return site_contract(host.wrapped(), host.site, blueprint)
    except GrowthError as refusal:
        if refusal.code != "ESP-434":
            raise
        return None


def fitting_pairs() -> tuple[tuple[Host, str], ...]:
    """Every host with every blueprint that fits it."""
    names = [blueprint.name for blueprint in list_blueprints()]
    return tuple((host, name) for host in HOSTS for name in names if fitting(host, name) is not None)


def all_cases(
    *, initialisers: Iterable[str] | None = None, optimizers: Iterable[OptimizerCase] = OPTIMIZERS
) -> Iterator[Case]:
    """The whole product, pair by pair. `initialisers` defaults to the library's own way and all that are registered."""
    chosen = tuple(initialisers) if initialisers is not None else (LIBRARY, *list_initialisers())
    for host, blueprint in fitting_pairs():
        for initialiser in chosen:
            for optimizer in optimizers:
                yield Case(host, blueprint, initialiser, optimizer)
