"""One more layer behind a layer: `depth_block`."""

from esper.contracts.assets import Hyperparameters
from esper.contracts.assets import SiteContract
from esper.runtime.tezzeret.blueprints.parts import activation
from esper.runtime.tezzeret.blueprints.parts import channels
from esper.runtime.tezzeret.blueprints.parts import graph
from esper.runtime.tezzeret.blueprints.parts import mix
from esper.runtime.tezzeret.blueprints.parts import mix_misfit
from esper.runtime.tezzeret.blueprints.parts import norm
from esper.runtime.tezzeret.blueprints.parts import width
from esper.runtime.tezzeret.blueprints.registering import ANY_KIND
from esper.runtime.tezzeret.blueprints.registering import register_blueprint
from esper.runtime.tezzeret.ir import INPUT
from esper.runtime.tezzeret.ir import KernelGraph


def _defaults(site: SiteContract) -> Hyperparameters:
    return {"units": channels(site)} if site.output_shape else {}


@register_blueprint(
    "depth_block",
    description="A residual block behind a layer, over its channels at every place: as many units as there are "
    "channels, GELU. The norm (GroupNorm for images, else LayerNorm over the channels of each place) has no "
    "parameters of its own: A follows it.",
    formula="y += B act(A norm(y) + a)",
    host_kinds=(ANY_KIND,),
    defaults={"units": 64, "activation": "gelu"},
    reads="output",
    site_defaults=_defaults,
    fits=mix_misfit,
)
def depth_block(site: SiteContract, hyperparameters: Hyperparameters) -> KernelGraph:
    """A pre-norm residual block (Xiong et al., arXiv 2002.04745) whose last layer begins at zero, so that it begins
    as the identity (Zhang et al., arXiv 1901.09321; LEMON, arXiv 2310.07999)."""
    size = channels(site)
    return graph(
        site,
        norm("norm", INPUT, site, size, affine=False),
        mix("down", "norm", site, width(hyperparameters["units"]), bias=True),
        activation("act", "down", hyperparameters["activation"]),
        mix("up", "act", site, size, bias=False),
    )
