"""The dataflow between the sites of a model, read off the autograd graph of one forward.

Measured on ten models: right on nine, where the module order is right on four and tracing on eight (control flow and
numpy in forward stop it). Only what ran without gradients leaves no lineage; there the order of execution stands in.

A block that contains other sites is a node beside them. Edges between single layers are those that there would be
without it; an edge that begins or ends at the block stays on the block's own level: its other end stands in the same
block (or in none). Between a block and what is inside of it there are no edges: names say what contains what.
"""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from esper.contracts.operational import LayerEdge
from esper.contracts.operational import LayerGraph
from esper.contracts.operational import SiteNode
from esper.runtime.kasmina.growing.between import PairsFound
from esper.runtime.kasmina.growing.between import with_pair
from esper.runtime.kasmina.growing.seen_pairs import pairs_seen
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.wrapping.geometry import Shape
from esper.runtime.kasmina.wrapping.hosts import kind_named
from esper.runtime.kasmina.wrapping.hosts import own_parameters
from esper.runtime.kasmina.wrapping.morphable import dormant
from esper.runtime.kasmina.wrapping.morphable import model_state
from esper.runtime.kasmina.wrapping.morphable import sites_of
from esper.runtime.kasmina.wrapping.observation import Call
from esper.runtime.kasmina.wrapping.observation import Node
from esper.runtime.kasmina.wrapping.observation import Observation
from esper.runtime.kasmina.wrapping.observation import observed
from esper.runtime.kasmina.wrapping.observation import walk
from esper.runtime.kasmina.wrapping.undisturbed import undisturbed


def layer_graph(model: nn.Module, run_forward: Callable[[], Any]) -> LayerGraph:
    """Sites and dataflow, from one call of `run_forward` (it calls the model and returns outputs or a loss).

    The model is left as it was, to the bit. Nodes are the sites that were called, in module order; `depth` is the
    longest way from an input in calls of single layers; the flops of a layer that is called several times are summed.
    `widen_output` names the second layer of a pair of linear layers or convolutions with one of relu, gelu, tanh,
    silu, sigmoid between them, and BatchNorms, pools and dropout besides, whose hidden units nothing else reads;
    `contract.attributes["pair_activation"]` then names the activation, `["pair_between"]` everything in between.
    """
    with undisturbed(model), dormant(model):
        seen = observed(model, run_forward)
        model_state(model).read_elsewhere = seen.read_elsewhere
        makers = seen.makers()
        blocks = {call.parent.site for call in seen.calls if call.parent is not None}
        for call in sorted(seen.calls, key=lambda call: call.started):
            _link(call, seen, makers, blocks)
        found = pairs_seen(model, seen, makers)
    graph = _graph(model, seen, blocks, found)
    model_state(model).graph = graph
    return graph


def _link(call: Call, seen: Observation, makers: Mapping[Node, list[Call]], blocks: set[str]) -> None:
    """Fill in from which calls what this one reads came, and how deep it lies."""

    def nearest(counts: Callable[[Call], bool]) -> list[Call]:
        def before(node: Node) -> list[Call]:
            return [maker for maker in makers.get(node, ()) if maker.ended < call.started and counts(maker)]

        found = {id(maker): maker for node in walk(list(call.inputs), before) for maker in before(node)}
        return sorted(found.values(), key=lambda source: source.ended)

    call.sources = nearest(lambda maker: maker.site not in blocks)
    if blocks:
        call.beside = nearest(lambda maker: maker.parent is call.parent)
    if not call.sources and call.reads_numbers:
        # Without gradients there is no lineage: what ended last before is taken for the source.
        layers = [c for c in seen.calls if c.ended < call.started and c.site not in blocks]
        last = max(layers, key=lambda c: c.ended, default=None)
        if last is not None and not last.outputs:
            call.sources = [last]
    call.depth = 1 + max((source.depth for source in call.sources), default=-1)


def _graph(model: nn.Module, seen: Observation, blocks: set[str], found: PairsFound) -> LayerGraph:
    nodes = []
    for name, module in sites_of(model).items():
        own = [call for call in seen.calls if call.site == name]
        if not own:
            continue
        kind = kind_named(state_of(module).kind)
        contract = kind.contract(name, module, own[0].input_shape, own[0].output_shape, state_of(module).dtype)
        pair = found.pairs.get(name)
        nodes.append(
            SiteNode(
                contract=contract if pair is None else with_pair(contract, pair),
                parameter_count=sum(p.numel() for _, p in own_parameters(module)),
                flops_per_sample=sum(kind.flops(module, call.input_shape, call.output_shape) for call in own),
                depth=own[0].depth,
                widen_output=None if pair is None else pair.second,
                seeds=tuple(slot.seed for slot in state_of(module).slots),
            )
        )
    edges: dict[tuple[str, str], int] = {}
    for call in seen.calls:
        within = call.sources if call.site not in blocks else []
        for source in (*within, *(s for s in call.beside if call.site in blocks or s.site in blocks)):
            edges[source.site, call.site] = _elements(source.output_shape)
    model_state(model).pair_refusals = dict(found.refusals)
    return LayerGraph(
        nodes=tuple(nodes),
        edges=tuple(LayerEdge(source=s, target=t, elements=elements) for (s, t), elements in edges.items()),
    )


def _elements(shape: Shape) -> int:
    return int(torch.Size(shape).numel())
