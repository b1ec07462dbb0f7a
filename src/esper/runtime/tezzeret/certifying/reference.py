"""A plain layer in the host's place: what a kernel's drift, latency and neighbourhood are measured against.

The forge has no host. For a layer whose geometry the contract tells (linear, convolutions, embedding) the reference
is a layer of that geometry; for anything else, and for kernels that read the output, a mix of the channels. Where the
two ends differ in their places (a pair with pooling between) the input is averaged down to the output's places.
"""

import math

import torch
from torch import Tensor
from torch import nn
from torch.nn import functional

from esper.contracts.assets import SiteContract
from esper.errors import BlueprintError
from esper.runtime.tezzeret.blueprints.parts import channels_first
from esper.runtime.tezzeret.blueprints.registry import host_graph
from esper.runtime.tezzeret.ir import check_graph
from esper.runtime.tezzeret.module import TORCH_DTYPES
from esper.runtime.tezzeret.module import GraphModule
from esper.runtime.tezzeret.samples import reads_ids

_WITH_GEOMETRY = ("linear", "conv1d", "conv2d")


class Reference(nn.Module):
    """A layer with one weight. `name` says what it is; `fan_in` is how many products one of its outputs adds up."""

    name: str
    fan_in: int
    weight: nn.Parameter

    def redraw(self, generator: torch.Generator) -> None:
        """Weights that keep the variance of a standard normal input."""
        drawn = torch.randn(self.weight.shape, generator=generator, device="cpu") / self.fan_in**0.5
        with torch.no_grad():
            self.weight.copy_(drawn.to(self.weight.dtype))


class _Geometry(Reference):
    """The host's own geometry, out of the kernel IR."""

    def __init__(self, site: SiteContract, graph: GraphModule) -> None:
        super().__init__()
        self.name = site.kind
        self.layer = graph
        (self.weight,) = graph.parameters()
        self.fan_in = self.weight[0].numel()

    def forward(self, x: Tensor) -> Tensor:
        """x: (rows, *input_shape) -> (rows, *output_shape)."""
        output: Tensor = self.layer(x)
        return output


class _Table(Reference):
    """An embedding."""

    def __init__(self, site: SiteContract, dtype: torch.dtype) -> None:
        super().__init__()
        self.name = "embedding"
        rows = site.attributes["num_embeddings"]
        assert isinstance(rows, int)
        self.weight = nn.Parameter(torch.zeros((rows, site.output_shape[-1]), dtype=dtype, device="cpu"))
        self.fan_in = 1

    def forward(self, x: Tensor) -> Tensor:
        """x: (rows, *input_shape), ids -> (rows, *input_shape, embedding_dim)."""
        return functional.embedding(x, self.weight)


class _ChannelMix(Reference):
    """A linear layer over the channels, at every place alike."""

    def __init__(self, site: SiteContract, dtype: torch.dtype) -> None:
        super().__init__()
        self.name = "channel mix"
        self.axis = 1 if channels_first(site) else -1
        before, after = (shape[0 if self.axis == 1 else -1] for shape in (site.input_shape, site.output_shape))
        self.weight = nn.Parameter(torch.zeros((after, before), dtype=dtype, device="cpu"))
        self.fan_in = before
        self.places = site.output_shape[1:] if self.axis == 1 else site.output_shape[:-1]

    def forward(self, x: Tensor) -> Tensor:
        """x: (rows, *input_shape) -> (rows, *output_shape)."""
        x = x.movedim(self.axis, -1)
        if x.shape[1:-1] != self.places:
            flat = x.flatten(1, -2).movedim(-1, 1) if x.dim() > 2 else x.unsqueeze(-1)
            averaged = functional.adaptive_avg_pool1d(flat, math.prod(self.places))
            x = averaged.movedim(1, -1).reshape(x.shape[0], *self.places, x.shape[-1])
        return functional.linear(x, self.weight).movedim(-1, self.axis)


def reference_for(site: SiteContract) -> Reference:
    """A zero layer that reads what a kernel of this site reads and gives what it gives, in the site's dtype."""
    dtype = TORCH_DTYPES[site.dtype]
    if reads_ids(site):
        return _Table(site, dtype)
    if site.reads == "input" and site.kind in _WITH_GEOMETRY:
        graph = host_graph(site)
        try:
            typed = check_graph(graph)
        except BlueprintError:
            # The far end of a pair may be of another geometry than its first layer reaches.
            return _ChannelMix(site, dtype)
        if typed.output_shape == site.output_shape:
            zeros = {name: torch.zeros(shape, dtype=dtype, device="cpu") for name, shape in typed.tensors().items()}
            return _Geometry(site, GraphModule(graph, zeros, dtype))
    return _ChannelMix(site, dtype)
