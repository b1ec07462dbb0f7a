"""What blueprints are put together from: nodes of the IR in the form that a site's channels ask for."""

from pydantic import JsonValue

from esper.contracts.assets import Scalar
from esper.contracts.assets import SiteContract
from esper.runtime.tezzeret.ir import INPUT
from esper.runtime.tezzeret.ir import KernelGraph
from esper.runtime.tezzeret.ir import KernelNode

CONVOLUTIONS = ("conv1d", "conv2d")
_CHANNELS_FIRST = (*CONVOLUTIONS, "batch_norm", "group_norm")
CHANNELS_PER_GROUP = 16
"""Wu & He (arXiv 1803.08494, table 3) find 16 channels a group as good as 32 groups, for any width."""
MAX_GROUPS = 32


def channels_first(site: SiteContract) -> bool:
    """Whether the first dimension of a sample holds the channels; else the last one does."""
    usual = "first" if site.kind in _CHANNELS_FIRST else "last"
    return site.attributes.get("channel_axis", usual) == "first"


def is_image(site: SiteContract) -> bool:
    """Whether a kernel may look at all places of a sample at once: channels first and two axes of places or more.

    Anything else may be a sequence whose model must not see what comes later: there every place is by itself.
    """
    return channels_first(site) and len(site.output_shape) >= 3


def channels(site: SiteContract) -> int:
    """Channels of the site's output."""
    return site.output_shape[0 if channels_first(site) else -1]


def channel_axis(site: SiteContract) -> dict[str, JsonValue]:
    """The attribute of operations that work channel by channel."""
    return {"channel_axis": "first" if channels_first(site) else "last"}


def width(value: Scalar) -> int:
    """A hyperparameter that is a number of units."""
    assert isinstance(value, int)
    return value


def graph(site: SiteContract, *nodes: KernelNode) -> KernelGraph:
    """A graph whose output is the last node."""
    return KernelGraph(inputs={INPUT: site.input_shape}, nodes=nodes, outputs=(nodes[-1].id,))


def linear(node_id: str, source: str, out_features: int, *, bias: bool) -> KernelNode:
    """A linear layer over the last dimension."""
    attributes: dict[str, JsonValue] = {"out_features": out_features, "bias": bias}
    return KernelNode(id=node_id, op="linear", inputs=(source,), attributes=attributes)


def activation(node_id: str, source: str, name: Scalar) -> KernelNode:
    """An elementwise non-linearity."""
    return KernelNode(id=node_id, op="activation", inputs=(source,), attributes={"name": name})


def combination(node_id: str, op: str, left: str, right: str) -> KernelNode:
    """`add`, `subtract` or `multiply` of two nodes."""
    return KernelNode(id=node_id, op=op, inputs=(left, right))


def convolution(
    node_id: str,
    source: str,
    axes: int,
    out_channels: int,
    *,
    kernel_size: JsonValue = 1,
    stride: JsonValue = 1,
    padding: JsonValue = 0,
    dilation: JsonValue = 1,
    groups: int = 1,
    padding_mode: JsonValue = "zeros",
    bias: bool = False,
) -> KernelNode:
    """A convolution over one or two axes; a single number stands for all of them."""
    attributes: dict[str, JsonValue] = {
        "out_channels": out_channels,
        "kernel_size": _spread(kernel_size, axes),
        "stride": _spread(stride, axes),
        "padding": _spread(padding, axes),
        "dilation": _spread(dilation, axes),
        "groups": groups,
        "padding_mode": padding_mode,
        "bias": bias,
    }
    return KernelNode(id=node_id, op=f"conv{axes}d", inputs=(source,), attributes=attributes)


def host_convolution(
    node_id: str,
    source: str,
    axes: int,
    geometry: dict[str, JsonValue],
    out_channels: int,
    *,
    groups: int = 1,
    bias: bool = False,
) -> KernelNode:
    """A convolution of a host's spatial geometry (its contract's attributes). Groups are not the host's: a kernel may
    mix what the host keeps apart."""
    return convolution(
        node_id,
        source,
        axes,
        out_channels,
        kernel_size=geometry.get("kernel_size", 1),
        stride=geometry.get("stride", 1),
        padding=geometry.get("padding", 0),
        dilation=geometry.get("dilation", 1),
        groups=groups,
        padding_mode=geometry.get("padding_mode", "zeros"),
        bias=bias,
    )


def mix(node_id: str, source: str, site: SiteContract, out_channels: int, *, bias: bool) -> KernelNode:
    """A linear map of the channels at every place: a linear layer, or a convolution with a window of one where the
    channels come first."""
    axes = len(site.output_shape) - 1
    if not channels_first(site) or axes == 0:
        return linear(node_id, source, out_channels, bias=bias)
    return convolution(node_id, source, axes, out_channels, bias=bias)


def mix_misfit(site: SiteContract) -> str | None:
    """Why a site's channels cannot be mixed; None where they can."""
    if not site.output_shape:
        return "its output has no channels"
    if channels_first(site) and len(site.output_shape) > 3:
        return f"its output {site.output_shape} has more than two dimensions of places"
    return None


def norm(node_id: str, source: str, site: SiteContract, size: int, *, affine: bool) -> KernelNode:
    """A normalisation within the sample, so that a kernel does not depend on its batch: GroupNorm for images, else
    LayerNorm over the channels of each place. `size` is the number of channels."""
    if is_image(site):
        attributes: dict[str, JsonValue] = {"groups": groups_for(size), "affine": affine}
        return KernelNode(id=node_id, op="group_norm", inputs=(source,), attributes=attributes)
    attributes = {**channel_axis(site), "affine": affine}
    return KernelNode(id=node_id, op="layer_norm", inputs=(source,), attributes=attributes)


def groups_for(size: int) -> int:
    """The most groups, up to 32, that hold `CHANNELS_PER_GROUP` channels or more each; one if there are fewer."""
    fitting = (g for g in range(min(MAX_GROUPS, size // CHANNELS_PER_GROUP), 0, -1) if size % g == 0)
    return next(fitting, 1)


def _spread(value: JsonValue, axes: int) -> JsonValue:
    return [value] * axes if isinstance(value, int) else value
