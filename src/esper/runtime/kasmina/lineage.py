"""The dataflow between the sites of a model, read off the autograd graph of one forward.

Measured on ten models: right on nine, where the module order is right on four and tracing on eight (control flow and
numpy in forward stop it). Only what ran without gradients leaves no lineage; there the order of execution stands in.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import torch
from torch import Tensor
from torch import nn

from esper.contracts.assets import SiteContract
from esper.contracts.operational import LayerEdge
from esper.contracts.operational import LayerGraph
from esper.contracts.operational import SiteNode
from esper.runtime.kasmina.growing.fold import pair_obstacle
from esper.runtime.kasmina.layer import SiteState
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.wrapping.hosts import Shape
from esper.runtime.kasmina.wrapping.hosts import kind_named
from esper.runtime.kasmina.wrapping.morphable import dormant
from esper.runtime.kasmina.wrapping.morphable import model_state
from esper.runtime.kasmina.wrapping.morphable import recording
from esper.runtime.kasmina.wrapping.morphable import sites_of
from esper.runtime.kasmina.wrapping.undisturbed import undisturbed

_ACTIVATION_NODES = {
    "ReluBackward0": "relu",
    "GeluBackward0": "gelu",
    "TanhBackward0": "tanh",
    "SiluBackward0": "silu",
    "SigmoidBackward0": "sigmoid",
}

Node = Any
"""A node of the autograd graph."""


@dataclass
class _Call:
    site: str
    input_node: Node | None
    output_node: Node | None
    input_shape: Shape
    output_shape: Shape
    sources: list[int] = field(default_factory=list)
    depth: int = 0


class _Lineage:
    """Records every call of every site, in order."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []

    def record(self, module: nn.Module, state: SiteState, x: Tensor, output: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not output.requires_grad:
            # A frozen layer on frozen inputs leaves no trace of its own. A clone, so that in-place layers may follow.
            output = output.detach().requires_grad_().clone()
        kind = kind_named(state.kind)
        shapes = kind.sample_shape(x), kind.sample_shape(output)
        self.calls.append(_Call(state.name, x.grad_fn, output.grad_fn, *shapes))
        return output


def layer_graph(model: nn.Module, run_forward: Callable[[], Any]) -> LayerGraph:
    """Sites and dataflow, from one call of `run_forward` (it calls the model and returns outputs or a loss).

    The model is left as it was, to the bit. Nodes are the sites that were called, in module order; `depth` is the
    longest way from an input in calls of sites; the flops of a layer that is called several times are summed.
    `widen_output` names the second layer of a pair Linear -> one of relu, gelu, tanh, silu, sigmoid -> Linear whose
    hidden units nothing else reads; `contract.attributes["pair_activation"]` then names the activation.
    """
    lineage = _Lineage()
    with undisturbed(model), dormant(model), recording(model, lineage), torch.enable_grad():
        returned = run_forward()
        calls = lineage.calls
        readers = _readers(calls, returned)
        _link(calls)
        pairs = _pairs(calls, readers)
    graph = _graph(model, calls, pairs)
    model_state(model).graph = graph
    return graph


def _graph(model: nn.Module, calls: list[_Call], pairs: Mapping[str, tuple[str, str]]) -> LayerGraph:
    sites = sites_of(model)
    nodes = []
    for name, module in sites.items():
        own = [call for call in calls if call.site == name]
        if not own:
            continue
        kind = kind_named(state_of(module).kind)
        contract = kind.contract(name, module, own[0].input_shape, own[0].output_shape)
        second, activation = pairs.get(name, (None, None))
        if second is not None and pair_obstacle(model, module, sites[second]) is not None:
            second = None
        if second is not None:
            contract = with_pair(contract, str(activation))
        nodes.append(
            SiteNode(
                contract=contract,
                parameter_count=sum(p.numel() for n, p in module.named_parameters() if not n.startswith("kasmina.")),
                flops_per_sample=sum(kind.flops(module, call.input_shape, call.output_shape) for call in own),
                depth=own[0].depth,
                widen_output=second,
                seeds=tuple(slot.seed for slot in state_of(module).slots),
            )
        )
    edges: dict[tuple[str, str], int] = {}
    for call in calls:
        for source in call.sources:
            edges[calls[source].site, call.site] = _elements(calls[source].output_shape)
    return LayerGraph(
        nodes=tuple(nodes),
        edges=tuple(LayerEdge(source=s, target=t, elements=elements) for (s, t), elements in edges.items()),
    )


def with_pair(contract: SiteContract, activation: str) -> SiteContract:
    """The contract of the first layer of a pair."""
    return contract.model_copy(update={"attributes": {**contract.attributes, "pair_activation": activation}})


def _link(calls: list[_Call]) -> None:
    """Fill in from which calls each call's input came, and how deep it lies."""
    by_output = {call.output_node: index for index, call in enumerate(calls) if call.output_node is not None}
    for index, call in enumerate(calls):
        found = set()
        for node in _walk([call.input_node], stop=by_output):
            if node in by_output:
                found.add(by_output[node])
        call.sources = sorted(source for source in found if source < index)
        if not call.sources and index and calls[index - 1].output_node is None:
            call.sources = [index - 1]
        call.depth = 1 + max((calls[source].depth for source in call.sources), default=-1)


def _pairs(calls: list[_Call], readers: Mapping[Node, int]) -> dict[str, tuple[str, str]]:
    by_output = {call.output_node: call.site for call in calls if call.output_node is not None}
    found: dict[str, set[tuple[str, str]]] = {}
    matched: dict[str, int] = {}
    for call in calls:
        first, activation = _before(call, by_output, readers)
        if first is not None and activation is not None:
            found.setdefault(first, set()).add((call.site, activation))
            matched[first] = matched.get(first, 0) + 1
    count: dict[str, int] = {}
    for call in calls:
        count[call.site] = count.get(call.site, 0) + 1
    pairs = {}
    for first, seconds in found.items():
        second, activation = next(iter(seconds))
        # Every call of either must belong to the pair: another user of one of them would see the new units.
        whole = len(seconds) == 1 and matched[first] == count[first] == count[second]
        if whole and first != second:
            pairs[first] = (second, activation)
    return pairs


def _before(call: _Call, by_output: Mapping[Node, str], readers: Mapping[Node, int]) -> tuple[str | None, str | None]:
    """The layer whose activated output alone is what this call reads, and the activation."""
    node = call.input_node
    if node is None:
        return None, None
    activation = _ACTIVATION_NODES.get(node.name())
    if activation is None or (activation == "gelu" and node._saved_approximate != "none"):
        return None, None
    below = node.next_functions[0][0]
    if below not in by_output or readers.get(node) != 1 or readers.get(below) != 1:
        return None, None
    return by_output[below], activation


def _readers(calls: list[_Call], returned: Any) -> dict[Node, int]:
    """How many places read each node's result: other nodes, and the caller."""
    roots = [tensor.grad_fn for tensor in _tensors(returned) if tensor.grad_fn is not None]
    readers: dict[Node, int] = {}
    for node in roots:
        readers[node] = readers.get(node, 0) + 1
    for node in _walk([*roots, *(call.output_node for call in calls)], stop=()):
        for below, _ in node.next_functions:
            if below is not None:
                readers[below] = readers.get(below, 0) + 1
    return readers


def _walk(starts: Iterable[Node | None], stop: Iterable[Node]) -> Iterator[Node]:
    """Every node below `starts` once, not going past those in `stop`."""
    ends = set(stop)
    seen: set[Node] = set()
    stack = [node for node in starts if node is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if node not in ends:
            stack.extend(below for below, _ in node.next_functions if below is not None)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _elements(shape: Shape) -> int:
    return int(torch.Size(shape).numel())
