"""Sites of every kind, drawn or fixed, for the tests of the forge."""

import torch
from hypothesis import strategies as st
from torch import nn

from esper.contracts.assets import SiteContract
from esper.contracts.operational import LayerGraph
from esper.contracts.operational import SiteNode
from esper.runtime.tezzeret.blueprints.registry import list_blueprints
from esper.runtime.tezzeret.blueprints.registry import site_contract_for


def site(kind: str, shape: tuple[int, ...], output: tuple[int, ...] | None = None, **attributes) -> SiteContract:
    """A site that is named `a`; without `output` it gives the shape that it reads."""
    return SiteContract(
        site="a",
        output_site="a",
        kind=kind,
        input_shape=shape,
        output_shape=shape if output is None else output,
        dtype=attributes.pop("dtype", "float32"),
        attributes=attributes,
    )


def node_of(contract: SiteContract, widen_output: str | None = None) -> SiteNode:
    """The node of a layer graph that a site is."""
    return SiteNode(
        contract=contract, parameter_count=1, flops_per_sample=1, depth=0, widen_output=widen_output, seeds=()
    )


def contract_of(blueprint: str, contract: SiteContract) -> SiteContract | None:
    """What a kernel of a blueprint that needs one site is built for; None where it does not fit."""
    node = node_of(contract)
    return site_contract_for(blueprint, node, LayerGraph(nodes=(node,), edges=()))


SITES = (
    site("linear", (6,), (5,)),
    site("linear", (4, 6), (4, 5), dtype="float64"),
    site("conv1d", (4, 9), (6, 5), kernel_size=[3], stride=[2], padding=[1], dilation=[1], groups=2),
    site("conv2d", (4, 8, 8), (6, 4, 4), kernel_size=[3, 3], stride=[2, 2], padding=[1, 1], groups=2),
    site("conv2d", (4, 6, 7), (6, 6, 7), kernel_size=[1, 1], dtype="bfloat16"),
    site("embedding", (), (6,), num_embeddings=11, embedding_dim=6, padding_idx=3),
    site("embedding", (5,), (5, 6), num_embeddings=11, embedding_dim=6),
    site("layer_norm", (5, 6)),
    site("group_norm", (32, 4, 4)),
    site("batch_norm", (6,), channel_axis="first"),
    site("batch_norm", (6, 4)),
    site("batch_norm", (6, 4, 4)),
    site("attention", (7, 8), num_heads=2, embed_dim=8),
    site("block", (7, 8), channel_axis="last"),
    site("block", (16, 6, 6), channel_axis="first"),
    site("block", (8,), channel_axis="last"),
)

CASES = [
    (blueprint.name, made)
    for contract in SITES
    for blueprint in list_blueprints()
    if (made := contract_of(blueprint.name, contract)) is not None
]
"""Every packaged blueprint for one site at every site that takes it."""

sizes = st.integers(1, 6)


@st.composite
def any_site(draw) -> SiteContract:
    """A site of any kind with channels of two or more."""
    kind = draw(
        st.sampled_from(["linear", "conv1d", "conv2d", "embedding", "layer_norm", "batch_norm", "attention", "block"])
    )
    channels, outputs = draw(st.integers(2, 8)), draw(st.integers(2, 8))
    leading = tuple(draw(st.lists(sizes, max_size=2)))
    if kind == "linear":
        return site(kind, (*leading, channels), (*leading, outputs))
    if kind in ("conv1d", "conv2d"):
        return draw(convolution(2 if kind == "conv2d" else 1))
    if kind == "embedding":
        padding = draw(st.none() | st.integers(0, 8))
        return site(kind, leading, (*leading, outputs), num_embeddings=9, embedding_dim=outputs, padding_idx=padding)
    if kind == "layer_norm":
        return site(kind, (*leading, channels))
    if kind == "batch_norm":
        return site(kind, (channels, *leading))
    if kind == "attention":
        return site(kind, (draw(sizes), 2 * channels), num_heads=2)
    if draw(st.booleans()):
        return site(kind, (channels, draw(st.integers(2, 6)), draw(st.integers(2, 6))), channel_axis="first")
    return site(kind, (*leading, channels), channel_axis="last")


@st.composite
def convolution(draw, axes: int) -> SiteContract:
    """A convolution with groups, strides, dilations and padding modes, and what torch says that it gives."""
    groups = draw(st.integers(1, 2))
    geometry = {
        "kernel_size": [draw(st.integers(1, 3)) for _ in range(axes)],
        "stride": [draw(st.integers(1, 2)) for _ in range(axes)],
        "padding": [draw(st.integers(0, 2)) for _ in range(axes)],
        "dilation": [draw(st.integers(1, 2)) for _ in range(axes)],
        "groups": groups,
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    }
    channels, outputs = groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 4))
    shape = (channels, *[draw(st.integers(5, 8)) for _ in range(axes)])
    host = (nn.Conv1d if axes == 1 else nn.Conv2d)(channels, outputs, device="meta", **geometry)
    produced = tuple(host(torch.empty((1, *shape), device="meta")).shape[1:])
    return site(f"conv{axes}d", shape, produced, **geometry)
