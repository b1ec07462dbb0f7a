"""More attention heads: `attention`."""

from pydantic import JsonValue

from esper.contracts.assets import Hyperparameters
from esper.contracts.assets import SiteContract
from esper.runtime.tezzeret.blueprints.parts import channels
from esper.runtime.tezzeret.blueprints.parts import channels_first
from esper.runtime.tezzeret.blueprints.parts import graph
from esper.runtime.tezzeret.blueprints.parts import linear
from esper.runtime.tezzeret.blueprints.parts import norm
from esper.runtime.tezzeret.blueprints.parts import width
from esper.runtime.tezzeret.blueprints.registering import register_blueprint
from esper.runtime.tezzeret.ir import INPUT
from esper.runtime.tezzeret.ir import KernelGraph
from esper.runtime.tezzeret.ir import KernelNode

WIDEST_HEAD = 64


def _misfit(site: SiteContract) -> str | None:
    if channels_first(site) or len(site.input_shape) != 2 or site.input_shape != site.output_shape:
        return f"its input {site.input_shape} and output {site.output_shape} are not one (places, channels)"
    return None


def _defaults(site: SiteContract) -> Hyperparameters:
    """Heads as wide as the host's own."""
    if len(site.output_shape) != 2:
        return {}
    size, heads = site.output_shape[-1], site.attributes.get("num_heads")
    head_dim = size // heads if isinstance(heads, int) and heads > 0 else min(size, WIDEST_HEAD)
    return {"head_dim": max(1, head_dim), "causal": site.attributes.get("causal", True) is not False}


@register_blueprint(
    "attention",
    description="More self-attention heads, one by default, as wide as the host's own (64 at most beside a block, "
    "which has none; there a LayerNorm comes first). Causal unless told otherwise: a kernel does not see the host's "
    "mask, and in a language model a place must not read what comes after it. Give causal=False for an encoder.",
    formula="y += B heads(norm(x))",
    host_kinds=("attention", "block"),
    defaults={"heads": 1, "head_dim": 64, "causal": True},
    site_defaults=_defaults,
    fits=_misfit,
)
def attention(site: SiteContract, hyperparameters: Hyperparameters) -> KernelGraph:
    """Multi-head self-attention (Vaswani et al., arXiv 1706.03762, section 3.2) whose projection of the output
    begins at zero (LEMON, arXiv 2310.07999)."""
    heads, head_dim = width(hyperparameters["heads"]), width(hyperparameters["head_dim"])
    size, nodes, source = channels(site), [], INPUT
    if site.kind == "block":
        # A block reads the residual stream as it is; an attention layer is given what was normalised for it.
        nodes.append(norm("norm", INPUT, site, size, affine=False))
        source = "norm"
    attributes: dict[str, JsonValue] = {
        "heads": heads,
        "head_dim": head_dim,
        "causal": hyperparameters["causal"],
    }
    nodes.append(KernelNode(id="heads", op="self_attention", inputs=(source,), attributes=attributes))
    return graph(site, *nodes, linear("up", "heads", size, bias=False))
