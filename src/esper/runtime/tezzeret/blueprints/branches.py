"""Branches beside one layer, up(act(down(x))): `lowrank` and `bottleneck`."""

from esper.contracts.assets import Hyperparameters
from esper.contracts.assets import Scalar
from esper.contracts.assets import SiteContract
from esper.runtime.tezzeret.blueprints.parts import CONVOLUTIONS
from esper.runtime.tezzeret.blueprints.parts import activation
from esper.runtime.tezzeret.blueprints.parts import channels
from esper.runtime.tezzeret.blueprints.parts import graph
from esper.runtime.tezzeret.blueprints.parts import host_convolution
from esper.runtime.tezzeret.blueprints.parts import mix
from esper.runtime.tezzeret.blueprints.parts import mix_misfit
from esper.runtime.tezzeret.blueprints.parts import width
from esper.runtime.tezzeret.blueprints.registering import register_blueprint
from esper.runtime.tezzeret.ir import INPUT
from esper.runtime.tezzeret.ir import KernelGraph
from esper.runtime.tezzeret.ir import KernelNode


def _branch(site: SiteContract, rank: Scalar, name: Scalar | None) -> KernelGraph:
    """up(act(down(x))) with node ids `down`, `act`, `up`; `up` has no bias, so that zero weights mean zero."""
    units, biased = width(rank), name is not None
    hidden = "act" if biased else "down"
    if site.kind in CONVOLUTIONS:
        axes = len(site.input_shape) - 1
        down = host_convolution("down", INPUT, axes, site.attributes, units, bias=biased)
    elif site.kind == "embedding":
        down = _table(site, units)
    else:
        down = mix("down", INPUT, site, units, bias=biased)
    up = mix("up", hidden, site, channels(site), bias=False)
    return graph(site, down, up) if name is None else graph(site, down, activation("act", "down", name), up)


def _table(site: SiteContract, units: int) -> KernelNode:
    given = site.attributes
    attributes = {"num_embeddings": given.get("num_embeddings"), "embedding_dim": units}
    if given.get("padding_idx") is not None:
        attributes["padding_idx"] = given["padding_idx"]
    return KernelNode(id="down", op="embedding", inputs=(INPUT,), attributes=attributes)


def _bottleneck_defaults(site: SiteContract) -> Hyperparameters:
    return {"rank": 16} if site.kind in CONVOLUTIONS else {}


@register_blueprint(
    "bottleneck",
    description="Non-linear capacity beside one layer. Rank 32, on convolutions 16: there A has the host's kernel "
    "size, stride, padding and dilation and B a window of one. Beside a norm, attention or a block it reads "
    "their input.",
    formula="y += B act(A x + a)",
    host_kinds=("linear", "conv1d", "conv2d", "layer_norm", "group_norm", "batch_norm", "attention", "block"),
    defaults={"rank": 32, "activation": "relu"},
    site_defaults=_bottleneck_defaults,
    fits=mix_misfit,
)
def bottleneck(site: SiteContract, hyperparameters: Hyperparameters) -> KernelGraph:
    """The residual branch of growth-by-functional-gradient (TINY, arXiv 2405.19816; SENN, arXiv 2307.04526)."""
    return _branch(site, hyperparameters["rank"], hyperparameters["activation"])


@register_blueprint(
    "lowrank",
    description="The control: a full-rank trainable host gains no capacity from it; on a frozen host an adapter. For "
    "an embedding A is a narrow table.",
    formula="y += B A x",
    host_kinds=("linear", "conv1d", "conv2d", "embedding"),
    defaults={"rank": 8},
    capacity_free=True,
)
def lowrank(site: SiteContract, hyperparameters: Hyperparameters) -> KernelGraph:
    """Low-rank adaptation without its scale (LoRA, arXiv 2106.09685, section 4.1)."""
    return _branch(site, hyperparameters["rank"], None)
