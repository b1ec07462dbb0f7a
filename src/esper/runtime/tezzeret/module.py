"""From IR to a trainable `nn.Module`: the one place where a kernel's operations become torch modules."""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import Protocol

import torch
from torch import Tensor
from torch import nn

from esper.contracts.base import Digest
from esper.runtime.tezzeret.ir import INPUT
from esper.runtime.tezzeret.ir import KernelGraph
from esper.runtime.tezzeret.ir import TypedNode
from esper.runtime.tezzeret.ir import check_graph
from esper.runtime.tezzeret.manifest import KernelManifest

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
}


def _linear(node: TypedNode, dtype: torch.dtype) -> nn.Module:
    attributes = node.attributes
    return nn.Linear(node.shapes[0][-1], attributes.out_features, bias=attributes.bias, device="meta", dtype=dtype)


def _conv2d(node: TypedNode, dtype: torch.dtype) -> nn.Module:
    attributes = node.attributes
    return nn.Conv2d(
        node.shapes[0][0],
        attributes.out_channels,
        kernel_size=attributes.kernel_size,
        stride=attributes.stride,
        padding=attributes.padding,
        dilation=attributes.dilation,
        groups=attributes.groups,
        padding_mode=attributes.padding_mode,
        bias=attributes.bias,
        device="meta",
        dtype=dtype,
    )


def _activation(node: TypedNode, dtype: torch.dtype) -> nn.Module:
    return _ACTIVATIONS[node.attributes.name]()


MODULES: Mapping[str, Callable[[TypedNode, torch.dtype], nn.Module]] = {
    "linear": _linear,
    "conv2d": _conv2d,
    "activation": _activation,
}
"""Operation to its module on the meta device: no memory, no random number."""


class Accelerated(Protocol):
    """A compiled form of a kernel (`compile.CompiledKernel`)."""

    def covers(self, x: Tensor) -> bool: ...

    def __call__(self, x: Tensor) -> Tensor: ...


class GraphModule(nn.Module):
    """Runs a kernel graph. Children are the graph's nodes by id, so parameters are named `<node>.<tensor>`.

    `tensors` must hold exactly the graph's tensors; they become the parameters themselves, uncopied.
    """

    def __init__(self, graph: KernelGraph, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        typed = check_graph(graph)
        for node in typed.nodes:
            # Straight into the table: an id such as `forward` is legal in IR and must not shadow a method.
            self._modules[node.id] = MODULES[node.op](node, dtype)
        self.load_state_dict(dict(tensors), strict=True, assign=True)
        self._plan = tuple((node.id, node.inputs) for node in typed.nodes)
        self._output = typed.output

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, *input_shape) -> delta: (batch, *output_shape)."""
        values: dict[str, Tensor] = {INPUT: x}
        for node_id, inputs in self._plan:
            module: Any = self._modules[node_id]
            values[node_id] = module(*[values[name] for name in inputs])
        return values[self._output]


class KernelModule(GraphModule):
    """A kernel, alive: `forward(x)` is the delta that is added to the host's output.

    It is a private trainable copy; the bytes that it came from are `manifest` and `digest`.
    """

    def __init__(self, manifest: KernelManifest, digest: Digest, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(manifest.graph, tensors, TORCH_DTYPES[manifest.site.dtype])
        self.manifest = manifest
        self.digest = digest
        self.accelerated: Accelerated | None = None
        """Set by `CompiledKernel.use_compiled`; not copied and not pickled with the kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, *input_shape) -> delta: (batch, *output_shape)."""
        if self.accelerated is not None and self.accelerated.covers(x):
            return self.accelerated(x)
        return super().forward(x)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"accelerated": None}

    def updown(self) -> tuple[nn.Module, str, nn.Module] | None:
        """(down, activation, up) when the kernel is up(act(down(x))), else None: what a wide bank concatenates.
        The activation of a kernel without one, up(down(x)), is `identity`."""
        nodes = check_graph(self.manifest.graph).nodes
        before = (INPUT, *(node.id for node in nodes))
        chained = all(node.inputs == (name,) for node, name in zip(nodes, before, strict=False))
        between = tuple(node.op for node in nodes[1:-1])
        ends = nodes[0].op == nodes[-1].op and nodes[0].op in {"linear", "conv2d"}
        if not chained or not ends or len(nodes) < 2 or between not in {(), ("activation",)}:
            return None
        activation = str(nodes[1].attributes.name) if between else "identity"
        children = dict(self.named_children())
        return children[nodes[0].id], activation, children[nodes[-1].id]
