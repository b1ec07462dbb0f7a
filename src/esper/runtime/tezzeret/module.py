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
from esper.runtime.tezzeret.primitives import Add
from esper.runtime.tezzeret.primitives import Affine
from esper.runtime.tezzeret.primitives import ChannelNorm
from esper.runtime.tezzeret.primitives import Gate
from esper.runtime.tezzeret.primitives import Mean
from esper.runtime.tezzeret.primitives import Multiply
from esper.runtime.tezzeret.primitives import SelfAttention
from esper.runtime.tezzeret.primitives import Subtract

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


def _convolution(node: TypedNode, dtype: torch.dtype) -> nn.Module:
    attributes = node.attributes
    kind: Any = nn.Conv1d if node.op == "conv1d" else nn.Conv2d
    made: nn.Module = kind(
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
    return made


def _embedding(node: TypedNode, dtype: torch.dtype) -> nn.Module:
    attributes = node.attributes
    return nn.Embedding(
        attributes.num_embeddings,
        attributes.embedding_dim,
        padding_idx=attributes.padding_idx,
        device="meta",
        dtype=dtype,
    )


def _self_attention(node: TypedNode, dtype: torch.dtype) -> nn.Module:
    attributes = node.attributes
    return SelfAttention(
        node.shapes[0][-1], attributes.heads, attributes.head_dim, attributes.causal, device="meta", dtype=dtype
    )


def _activation(node: TypedNode, dtype: torch.dtype) -> nn.Module:
    return _ACTIVATIONS[node.attributes.name]()


def _layer_norm(node: TypedNode, dtype: torch.dtype) -> nn.Module:
    attributes = node.attributes
    first = attributes.channel_axis == "first"
    size = node.shapes[0][0 if first else -1]
    kind = ChannelNorm if first else nn.LayerNorm
    return kind(size, attributes.eps, elementwise_affine=attributes.affine, device="meta", dtype=dtype)


def _group_norm(node: TypedNode, dtype: torch.dtype) -> nn.Module:
    attributes = node.attributes
    channels = node.shapes[0][0]
    return nn.GroupNorm(attributes.groups, channels, attributes.eps, attributes.affine, device="meta", dtype=dtype)


def _batch_norm(node: TypedNode, dtype: torch.dtype) -> nn.Module:
    attributes = node.attributes
    shape = node.shapes[0]
    kind: Any = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}[len(shape)]
    made: nn.Module = kind(
        shape[0],
        eps=attributes.eps,
        momentum=attributes.momentum,
        affine=attributes.affine,
        track_running_stats=attributes.track_running_stats,
        device="meta",
        dtype=dtype,
    )
    return made


def _affine(node: TypedNode, dtype: torch.dtype) -> nn.Module:
    attributes = node.attributes
    (channels,) = node.tensors()["weight"]
    return Affine(channels, attributes.channel_axis, attributes.bias, device="meta", dtype=dtype)


def _gate(node: TypedNode, dtype: torch.dtype) -> nn.Module:
    (channels,) = node.tensors()["weight"]
    return Gate(channels, node.attributes.channel_axis, device="meta", dtype=dtype)


def _max_pool2d(node: TypedNode, dtype: torch.dtype) -> nn.Module:
    given = node.attributes
    return nn.MaxPool2d(given.kernel_size, given.stride, given.padding, given.dilation, ceil_mode=given.ceil_mode)


def _avg_pool2d(node: TypedNode, dtype: torch.dtype) -> nn.Module:
    given = node.attributes
    return nn.AvgPool2d(given.kernel_size, given.stride, given.padding, given.ceil_mode, given.count_include_pad)


MODULES: Mapping[str, Callable[[TypedNode, torch.dtype], nn.Module]] = {
    "linear": _linear,
    "embedding": _embedding,
    "self_attention": _self_attention,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "activation": _activation,
    "affine": _affine,
    "gate": _gate,
    "add": lambda node, dtype: Add(),
    "subtract": lambda node, dtype: Subtract(),
    "multiply": lambda node, dtype: Multiply(),
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "mean": lambda node, dtype: Mean(node.attributes.axes),
    "max_pool2d": _max_pool2d,
    "avg_pool2d": _avg_pool2d,
}
"""Operation to its module on the meta device: no memory, no random number."""


_UP_AND_DOWN = {("linear", "linear"), ("conv1d", "conv1d"), ("conv2d", "conv2d"), ("embedding", "linear")}


class Accelerated(Protocol):
    """A compiled form of a kernel (`compile.CompiledKernel`)."""

    def covers(self, x: Tensor) -> bool: ...

    def __call__(self, x: Tensor) -> Tensor: ...


class GraphModule(nn.Module):
    """Runs a kernel graph. Children are the graph's nodes by id, so parameters are named `<node>.<tensor>`.

    `tensors` must hold exactly the graph's tensors and buffers; they become the parameters themselves, uncopied.
    """

    def __init__(self, graph: KernelGraph, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        typed = check_graph(graph)
        self.typed = typed
        """The graph as it was checked: whoever asks about its nodes and shapes need not check it again."""
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

    def chain(self) -> tuple[tuple[str, str, nn.Module], ...] | None:
        """(node id, operation, module) of every node in order, when each one reads only the one before it and the
        first only the input; else None."""
        nodes = self.typed.nodes
        before = (INPUT, *(node.id for node in nodes))
        if any(node.inputs != (name,) for node, name in zip(nodes, before, strict=False)):
            return None
        children = dict(self.named_children())
        return tuple((node.id, node.op, children[node.id]) for node in nodes)

    def updown(self) -> tuple[nn.Module, str, nn.Module] | None:
        """(down, activation, up) when the kernel is up(act(down(x))), else None: what a wide bank concatenates.
        The activation of a kernel without one, up(down(x)), is `identity`."""
        chain = self.chain()
        if chain is None or len(chain) < 2:
            return None
        ends = (chain[0][1], chain[-1][1])
        between = chain[1:-1]
        if ends not in _UP_AND_DOWN or tuple(op for _, op, _ in between) not in {(), ("activation",)}:
            return None
        activation = "identity"
        if between:
            activation = next(
                str(node.attributes["name"]) for node in self.manifest.graph.nodes if node.id == between[0][0]
            )
        return chain[0][2], activation, chain[-1][2]
