"""How a function becomes a blueprint: the table of all of them and the decorator that writes into it."""

from collections.abc import Callable
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pydantic import JsonValue

from esper.contracts.assets import Blueprint
from esper.contracts.assets import Hyperparameters
from esper.contracts.assets import SiteContract
from esper.errors import BlueprintError
from esper.runtime.tezzeret.ir import KernelGraph

BlueprintFunction = Callable[[SiteContract, Hyperparameters], KernelGraph]
DefaultsRule = Callable[[SiteContract], Hyperparameters]
FitRule = Callable[[SiteContract], str | None]
"""Why a site of the right kind does not take a blueprint; None when it does."""

ANY_KIND = "*"


@dataclass(frozen=True)
class Registered:
    """One blueprint with what only the forge needs of it."""

    blueprint: Blueprint
    function: BlueprintFunction
    site_defaults: DefaultsRule
    fits: FitRule
    reads: Literal["input", "output"]
    spans_pair: bool


TABLE: dict[str, Registered] = {}


def register_blueprint(
    name: str,
    *,
    description: str,
    formula: str,
    host_kinds: Iterable[str],
    defaults: Hyperparameters,
    reads: Literal["input", "output"] = "input",
    site_defaults: DefaultsRule = lambda site: {},
    fits: FitRule = lambda site: None,
    version: int = 1,
    capacity_free: bool = False,
    spans_pair: bool = False,
    graph: dict[str, JsonValue] | None = None,
) -> Callable[[BlueprintFunction], BlueprintFunction]:
    """Register a function as a blueprint: it gets a site's contract and hyperparameters and returns IR.

    `host_kinds` are kinds of sites, or `("*",)` for all; `fits(site)` may refuse one of them with a reason. `reads`
    says what the kernel's `x` is: the host's input, or its output so far. `site_defaults(site)` overrides `defaults`
    where they depend on the site; both must name the same hyperparameters. `spans_pair` says that the kernel reads a
    site and adds to the next one (`SiteNode.widen_output`); `graph` is the template of one that was submitted as data.
    Raises BlueprintError ESP-421 when the name is taken.
    """
    blueprint = Blueprint(
        name=name,
        version=version,
        description=description,
        formula=formula,
        host_kinds=tuple(host_kinds),
        defaults=dict(defaults),
        capacity_free=capacity_free,
        reads=reads,
        graph=graph,
    )

    def register(function: BlueprintFunction) -> BlueprintFunction:
        if name in TABLE:
            raise BlueprintError("ESP-421", f"blueprint '{name}' is registered already")
        TABLE[name] = Registered(blueprint, function, site_defaults, fits, reads, spans_pair)
        return function

    return register
