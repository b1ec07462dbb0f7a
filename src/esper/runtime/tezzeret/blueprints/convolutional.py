"""Branches with a window, for images: `conv_bottleneck` and `depthwise`."""

from typing import Any

from pydantic import JsonValue

from esper.contracts.assets import Hyperparameters
from esper.contracts.assets import SiteContract
from esper.runtime.tezzeret.blueprints.parts import activation
from esper.runtime.tezzeret.blueprints.parts import channels
from esper.runtime.tezzeret.blueprints.parts import channels_first
from esper.runtime.tezzeret.blueprints.parts import convolution
from esper.runtime.tezzeret.blueprints.parts import graph
from esper.runtime.tezzeret.blueprints.parts import host_convolution
from esper.runtime.tezzeret.blueprints.parts import norm
from esper.runtime.tezzeret.blueprints.parts import width
from esper.runtime.tezzeret.blueprints.registering import register_blueprint
from esper.runtime.tezzeret.ir import INPUT
from esper.runtime.tezzeret.ir import KernelGraph

WINDOW = 3


def _misfit(site: SiteContract) -> str | None:
    if not channels_first(site) or len(site.input_shape) != 3 or len(site.output_shape) != 3:
        return f"its input {site.input_shape} and output {site.output_shape} are not both (channels, height, width)"
    return None


def _geometry(site: SiteContract) -> dict[str, JsonValue]:
    """A window of three by three with the host's stride wherever that gives the host's places, else the host's own
    geometry."""
    steps: Any = site.attributes.get("stride", 1) if site.kind == "conv2d" else 1
    stride = (steps, steps) if isinstance(steps, int) else tuple(steps)
    places = tuple((size - 1) // step + 1 for size, step in zip(site.input_shape[1:], stride, strict=True))
    if places != site.output_shape[1:]:
        return site.attributes
    return {"kernel_size": [WINDOW, WINDOW], "stride": list(stride), "padding": [1, 1]}


def _rank(site: SiteContract) -> Hyperparameters:
    return {"rank": max(8, channels(site) // 4)} if site.output_shape else {}


@register_blueprint(
    "conv_bottleneck",
    description="A convolutional residual branch, 1x1 -> 3x3 -> 1x1, with the norms inside and nothing behind the "
    "zero. A quarter of the output's channels, 8 at least, ReLU.",
    formula="y += C act(norm(B act(norm(A x))))",
    host_kinds=("conv2d", "block"),
    defaults={"rank": 16, "activation": "relu"},
    site_defaults=_rank,
    fits=_misfit,
)
def conv_bottleneck(site: SiteContract, hyperparameters: Hyperparameters) -> KernelGraph:
    """The bottleneck of ResNet (He et al., arXiv 1512.03385, figure 5) with GroupNorm, its last convolution zero and
    bare: a zero inside a norm is divided by sqrt(epsilon) and jumps at the first step."""
    rank, name = width(hyperparameters["rank"]), hyperparameters["activation"]
    return graph(
        site,
        convolution("reduce", INPUT, 2, rank),
        norm("norm1", "reduce", site, rank, affine=True),
        activation("act1", "norm1", name),
        host_convolution("window", "act1", 2, _geometry(site), rank),
        norm("norm2", "window", site, rank, affine=True),
        activation("act2", "norm2", name),
        convolution("up", "act2", 2, channels(site)),
    )


@register_blueprint(
    "depthwise",
    description="A cheap spatial branch: a 3x3 window for each input channel, ReLU, then a 1x1 mix.",
    formula="y += B act(D x + a)",
    host_kinds=("conv2d", "block"),
    defaults={"activation": "relu"},
    fits=_misfit,
)
def depthwise(site: SiteContract, hyperparameters: Hyperparameters) -> KernelGraph:
    """A depthwise separable convolution (MobileNet, arXiv 1704.04861, section 3.1) without its norms."""
    inputs = site.input_shape[0]
    return graph(
        site,
        host_convolution("down", INPUT, 2, _geometry(site), inputs, groups=inputs, bias=True),
        activation("act", "down", hyperparameters["activation"]),
        convolution("up", "act", 2, channels(site)),
    )
