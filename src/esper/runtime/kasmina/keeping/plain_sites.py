"""A site with what is grown beside it as ordinary PyTorch: a `torch.fx.GraphModule` of torch's own operations.

A single layer of torch becomes one whole. Any other module (a block, attention, a BatchNorm, a layer with a forward of
its own) stays what it is, with a forward hook that adds what was grown: the hook is the generated forward of a
`GraphModule` without parameters, which finds the block's modules in the module that calls it. Parameters keep their
names either way.
"""

import operator
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch import nn
from torch.nn import functional

from esper.runtime.kasmina.bank import Slot
from esper.runtime.kasmina.growing.folding.obstacles import computes_plainly
from esper.runtime.kasmina.layer import SiteState
from esper.runtime.kasmina.wrapping.hosts import kind_named
from esper.runtime.kasmina.wrapping.places import Way
from esper.runtime.tezzeret.build import KernelModule
from esper.runtime.tezzeret.ir import INPUT
from esper.runtime.tezzeret.ir import TypedNode
from esper.runtime.tezzeret.ir import check_graph

_WHOLE = ("linear", "conv1d", "conv2d", "embedding", "layer_norm", "group_norm")
"""Forms of layers whose forward does the same in training and in evaluation mode, so that a trace of it is it."""

Emit = Callable[["_Writer", TypedNode, str, list[fx.Node]], fx.Node]


def site_obstacle(module: nn.Module, state: SiteState, slots: list[Slot]) -> str | None:
    """Why a site with these blocks cannot become plain PyTorch; None where it can. The module must have its own class
    back. Nothing is changed."""
    for slot in slots:
        assert isinstance(slot.kernel, KernelModule)
        operations = {node.id: node.op for node in slot.kernel.manifest.graph.nodes}
        for node, part in slot.kernel.named_children():
            if operations[node] not in _OPERATIONS and not type(part).__module__.startswith("torch."):
                return f"torch has no module for '{operations[node]}'"
    if _is_whole(module, state):
        try:
            fx.Tracer().trace(module)
        except Exception as error:  # tracing runs a parametrization on proxies: it may raise anything
            return f"its forward cannot be traced: {error}"
        return None
    if state.called_directly:
        return "its forward is called directly, and not the module: a forward hook would never run"
    if any(slot.reads == "input" for slot in slots) and state.reads_at is None:
        return "it is not known which of its arguments the blocks read: run the model once"
    odd = next((kind for kind, _ in state.returns_at if kind not in _CONTAINERS), None)
    return None if odd is None else f"it returns a {odd}, in which a forward hook cannot put another output"


def make_plain(module: nn.Module, state: SiteState, slots: list[Slot]) -> nn.Module:
    """The site as plain PyTorch: another module to take its place, or the same one with a forward hook.

    `slots` are the blocks that count; `site_obstacle` must have had nothing against them. The module must have its
    own class back.
    """
    # A Sequential runs all its children in turn: this one must pass on what it gets.
    container = nn.Identity()
    for slot in slots:
        assert isinstance(slot.kernel, KernelModule)
        container._modules[str(slot.seed.index)] = _plain_kernel(slot.kernel)
    container.training = module.training
    module._modules["kasmina"] = container
    if _is_whole(module, state):
        return _whole(module, slots)
    module.register_forward_hook(_hook(state, slots), prepend=True, with_kwargs=True)
    return module


def _is_whole(module: nn.Module, state: SiteState) -> bool:
    return kind_named(state.kind).form in _WHOLE and computes_plainly(module)


def _plain_kernel(kernel: KernelModule) -> nn.Module:
    """The modules of a kernel that are torch's own, and what holds the parameters of the others."""
    plain = nn.Module()
    plain.training = kernel.training
    for name, part in kernel.named_children():
        if type(part).__module__.startswith("torch."):
            plain._modules[name] = part
        elif part._parameters:
            holder = nn.Module()
            holder._parameters.update(part._parameters)
            holder.training = part.training
            plain._modules[name] = holder
    return plain


@dataclass(frozen=True)
class _Writer:
    """Writes into a graph: `owner` is None where the graph belongs to the module that has the parameters, else the
    node of that module."""

    graph: fx.Graph
    owner: fx.Node | None = None

    def call(self, path: str, inputs: list[fx.Node]) -> fx.Node:
        """Call a module by its dotted name."""
        if self.owner is None:
            return self.graph.call_module(path, tuple(inputs))
        return self.graph.call_method("__call__", (self._get(path), *inputs))

    def tensor(self, path: str) -> fx.Node:
        """Read a parameter by its dotted name."""
        return self.graph.get_attr(path) if self.owner is None else self._get(path)

    def do(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(function, args, kwargs)

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_method(name, args, kwargs)

    def _get(self, path: str) -> fx.Node:
        found = self.owner
        for name in path.split("."):
            found = self.graph.call_function(getattr, (found, name))
        assert found is not None
        return found

    def add_blocks(self, slots: list[Slot], x: fx.Node | None, total: fx.Node) -> fx.Node:
        """The output with what each block adds to it: those that read the input first, as in the live model."""
        for slot in (*(s for s in slots if s.reads == "input"), *(s for s in slots if s.reads == "output")):
            kernel = slot.kernel
            assert isinstance(kernel, KernelModule)
            typed = check_graph(kernel.manifest.graph)
            source = x if slot.reads == "input" else total
            assert source is not None
            values = {INPUT: source}
            for node in typed.nodes:
                path = f"kasmina.{slot.seed.index}.{node.id}"
                inputs = [values[name] for name in node.inputs]
                write = _OPERATIONS.get(node.op)
                values[node.id] = self.call(path, inputs) if write is None else write(self, node, path, inputs)
            delta = values[typed.output]
            if slot.alpha != 1.0:
                delta = self.do(torch.mul, delta, slot.alpha)
            total = self.do(torch.add, total, delta)
        return total


def _whole(module: nn.Module, slots: list[Slot]) -> fx.GraphModule:
    """The host's own forward, traced, plus its kernels node by node."""
    graph = fx.Tracer().trace(module)
    x = next(node for node in graph.nodes if node.op == "placeholder")
    end = next(node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(end):
        end.args = (_Writer(graph).add_blocks(slots, x, end.args[0]),)
    result = fx.GraphModule(module, graph)
    result.train(module.training)
    for name, value in module.__dict__.items():
        # Hooks move over; plain attributes such as `out_features` stay readable.
        if "hooks" in name or (name not in result.__dict__ and not name.startswith("_")):
            result.__dict__[name] = value
    return result


def _hook(state: SiteState, slots: list[Slot]) -> Callable[..., Any]:
    """A forward hook `(module, args, kwargs, output)` that returns the output with what was grown.

    The bound forward and not the GraphModule itself, so that tracers do not look for it in the module tree. It only
    does what proxies can do too: a pickled GraphModule is traced again when it is read.
    """
    graph = fx.Graph()
    names = ("module", "args", "kwargs", "output")
    module, args, kwargs, returned = (graph.placeholder(name) for name in names)
    write = _Writer(graph, module)
    frame = state.frame
    x = None
    if any(slot.reads == "input" for slot in slots):
        assert state.reads_at is not None
        (kind, key), *rest = state.reads_at
        x = _taken(write, args if kind == "args" else kwargs, ((kind, key), *rest))
        x = write.method("transpose", x, 0, 1) if frame.batch_axis else x
    total = _taken(write, returned, state.returns_at)
    total = write.method("transpose", total, 0, 1) if frame.batch_axis else total
    total = write.add_blocks(slots, x, total)
    total = write.method("transpose", total, 0, 1) if frame.batch_axis else total
    graph.output(_put_back(write, returned, state.returns_at, total))
    forward: Callable[..., Any] = fx.GraphModule(nn.Module(), graph).forward
    return forward


def _taken(write: _Writer, value: fx.Node, way: Way) -> fx.Node:
    for kind, key in way:
        value = write.do(getattr if kind in ("named", "dataclass") else operator.getitem, value, key)
    return value


def _put_back(write: _Writer, returned: fx.Node, way: Way, output: fx.Node) -> fx.Node:
    if not way:
        return output
    kind, key = way[0]
    inner = _put_back(write, _taken(write, returned, way[:1]), way[1:], output)
    if kind == "named":
        return write.method("_replace", returned, **{str(key): inner})
    if kind == "dict":
        return write.do(operator.or_, returned, {key: inner})
    assert isinstance(key, int)
    middle = (inner,) if kind == "tuple" else [inner]
    before = write.do(operator.getitem, returned, slice(None, key))
    after = write.do(operator.getitem, returned, slice(key + 1, None))
    return write.do(operator.add, write.do(operator.add, before, middle), after)


_CONTAINERS = ("tuple", "list", "dict", "named")


def _per_channel(write: _Writer, node: TypedNode, tensor: fx.Node, x: fx.Node) -> fx.Node:
    """One number for each channel in the form and dtype of what it meets."""
    typed = write.method("type_as", tensor, x)
    if node.attributes.channel_axis == "last":
        return typed
    return write.method("reshape", typed, (-1, *[1] * (len(node.shapes[0]) - 1)))


def _affine(write: _Writer, node: TypedNode, path: str, inputs: list[fx.Node]) -> fx.Node:
    (x,) = inputs
    scaled = write.do(torch.mul, x, _per_channel(write, node, write.tensor(f"{path}.weight"), x))
    if not node.attributes.bias:
        return scaled
    return write.do(torch.add, scaled, _per_channel(write, node, write.tensor(f"{path}.bias"), x))


def _gate(write: _Writer, node: TypedNode, path: str, inputs: list[fx.Node]) -> fx.Node:
    (x,) = inputs
    typed = write.method("type_as", write.tensor(f"{path}.weight"), x)
    return write.do(torch.mul, x, _per_channel(write, node, write.do(torch.tanh, typed), x))


def _layer_norm(write: _Writer, node: TypedNode, path: str, inputs: list[fx.Node]) -> fx.Node:
    if node.attributes.channel_axis == "last":
        return write.call(path, inputs)
    affine = node.attributes.affine
    weight, bias = ((write.tensor(f"{path}.{name}") if affine else None) for name in ("weight", "bias"))
    last = write.method("movedim", inputs[0], 1, -1)
    normed = write.do(functional.layer_norm, last, (node.shapes[0][0],), weight, bias, node.attributes.eps)
    return write.method("movedim", normed, -1, 1)


def _mean(write: _Writer, node: TypedNode, path: str, inputs: list[fx.Node]) -> fx.Node:
    return write.do(torch.mean, inputs[0], [axis + 1 for axis in node.attributes.axes], True)


def _self_attention(write: _Writer, node: TypedNode, path: str, inputs: list[fx.Node]) -> fx.Node:
    attributes = node.attributes
    projected = write.do(functional.linear, inputs[0], write.tensor(f"{path}.weight"))
    split = write.method("unflatten", projected, -1, (3, attributes.heads, attributes.head_dim))
    parts = write.method("permute", split, 2, 0, 3, 1, 4)
    query, key, value = (write.do(operator.getitem, parts, index) for index in range(3))
    mixed = write.do(functional.scaled_dot_product_attention, query, key, value, is_causal=attributes.causal)
    return write.method("flatten", write.method("transpose", mixed, 1, 2), 2)


def _combination(function: Callable[..., Any]) -> Emit:
    return lambda write, node, path, inputs: write.do(function, *inputs)


_OPERATIONS: Mapping[str, Emit] = {
    "affine": _affine,
    "gate": _gate,
    "layer_norm": _layer_norm,
    "mean": _mean,
    "self_attention": _self_attention,
    "add": _combination(torch.add),
    "subtract": _combination(torch.sub),
    "multiply": _combination(torch.mul),
}
"""Operations that torch has no module for, or not in every form."""
