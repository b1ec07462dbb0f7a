"""The control: `noop`, a kernel that does nothing."""

from esper.contracts.assets import Hyperparameters
from esper.contracts.assets import SiteContract
from esper.runtime.tezzeret.blueprints.parts import combination
from esper.runtime.tezzeret.blueprints.parts import graph
from esper.runtime.tezzeret.blueprints.registering import ANY_KIND
from esper.runtime.tezzeret.blueprints.registering import register_blueprint
from esper.runtime.tezzeret.ir import INPUT
from esper.runtime.tezzeret.ir import KernelGraph


@register_blueprint(
    "noop",
    description="The control: a graft with no parameters that changes nothing, ever. What a run gains by it is noise.",
    formula="y += y - y",
    host_kinds=(ANY_KIND,),
    defaults={},
    reads="output",
    capacity_free=True,
)
def noop(site: SiteContract, hyperparameters: Hyperparameters) -> KernelGraph:
    """A number less itself: exactly zero for every finite output, and so is its gradient."""
    return graph(site, combination("zero", "subtract", INPUT, INPUT))
