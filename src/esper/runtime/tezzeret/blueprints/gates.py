"""Corrections of what a layer gives, channel by channel: `scale_shift`, `norm_gate` and `se_gate`."""

from pydantic import JsonValue

from esper.contracts.assets import Hyperparameters
from esper.contracts.assets import SiteContract
from esper.runtime.tezzeret.blueprints.parts import activation
from esper.runtime.tezzeret.blueprints.parts import channel_axis
from esper.runtime.tezzeret.blueprints.parts import channels
from esper.runtime.tezzeret.blueprints.parts import combination
from esper.runtime.tezzeret.blueprints.parts import graph
from esper.runtime.tezzeret.blueprints.parts import is_image
from esper.runtime.tezzeret.blueprints.parts import mix
from esper.runtime.tezzeret.blueprints.parts import mix_misfit
from esper.runtime.tezzeret.blueprints.parts import norm
from esper.runtime.tezzeret.blueprints.parts import width
from esper.runtime.tezzeret.blueprints.registering import ANY_KIND
from esper.runtime.tezzeret.blueprints.registering import register_blueprint
from esper.runtime.tezzeret.ir import INPUT
from esper.runtime.tezzeret.ir import KernelGraph
from esper.runtime.tezzeret.ir import KernelNode


def _misfit(site: SiteContract) -> str | None:
    return None if site.output_shape else "its output has no channels"


def _reduced(site: SiteContract) -> Hyperparameters:
    return {"rank": max(4, channels(site) // 16)} if site.output_shape else {}


@register_blueprint(
    "scale_shift",
    description="A scale and a shift for each channel of the output.",
    formula="y += s * y + b",
    host_kinds=(ANY_KIND,),
    defaults={},
    reads="output",
    fits=_misfit,
)
def scale_shift(site: SiteContract, hyperparameters: Hyperparameters) -> KernelGraph:
    """Feature-wise scaling and shifting (SSF, arXiv 2210.08823, equation 3; FiLM without its condition, arXiv
    1709.07871) around the identity: s and b begin at zero."""
    attributes = {**channel_axis(site), "bias": True}
    return graph(site, KernelNode(id="scale", op="affine", inputs=(INPUT,), attributes=attributes))


@register_blueprint(
    "norm_gate",
    description="A normalisation that the output may turn to, channel by channel: GroupNorm for images, else LayerNorm "
    "over the channels of each place.",
    formula="y += tanh(s) * (norm(y) - y)",
    host_kinds=(ANY_KIND,),
    defaults={},
    reads="output",
    fits=_misfit,
)
def norm_gate(site: SiteContract, hyperparameters: Hyperparameters) -> KernelGraph:
    """A gate that begins closed (ReZero, arXiv 2003.04887, with one tanh gate a channel as Flamingo's, arXiv
    2204.14198) between the identity and a norm."""
    return graph(
        site,
        norm("norm", INPUT, site, channels(site), affine=True),
        combination("change", "subtract", "norm", INPUT),
        KernelNode(id="gate", op="gate", inputs=("change",), attributes=channel_axis(site)),
    )


@register_blueprint(
    "se_gate",
    description="Weighs the channels of an image by what all its places say, those of anything else at each place by "
    "itself (a mean over a sequence would tell a place what comes after it). A sixteenth of the channels, 4 at least, "
    "ReLU.",
    formula="y += y * tanh(W2 act(W1 mean(y) + a) + b)",
    host_kinds=(ANY_KIND,),
    defaults={"rank": 4, "activation": "relu"},
    reads="output",
    site_defaults=_reduced,
    fits=mix_misfit,
)
def se_gate(site: SiteContract, hyperparameters: Hyperparameters) -> KernelGraph:
    """Squeeze-and-excitation (arXiv 1709.01507, section 3) with 1 + tanh in place of its sigmoid, which is no
    identity anywhere: with W2 and b zero the factor is exactly one."""
    squeezed = INPUT
    nodes: list[KernelNode] = []
    if is_image(site):
        axes: list[JsonValue] = list(range(1, len(site.output_shape)))
        nodes.append(KernelNode(id="mean", op="mean", inputs=(INPUT,), attributes={"axes": axes}))
        squeezed = "mean"
    return graph(
        site,
        *nodes,
        mix("down", squeezed, site, width(hyperparameters["rank"]), bias=True),
        activation("act", "down", hyperparameters["activation"]),
        mix("up", "act", site, channels(site), bias=True),
        activation("tanh", "up", "tanh"),
        combination("weighed", "multiply", INPUT, "tanh"),
    )
