"""The kernel IR: a small typed operation graph as data, and every rule that it must keep.

One input `x`, one output, no cycle, operations from `operations.OPERATIONS` only, shapes inferred per sample. No
string of a graph is ever imported, evaluated or used as a path. Codes of `BlueprintError`:

    ESP-410 unknown operation       ESP-414 shape mismatch         ESP-418 bad or doubled node id
    ESP-411 cycle                   ESP-415 nodes or depth         ESP-419 not of the schema
    ESP-412 dangling input          ESP-416 over a budget          ESP-420 not JSON as it must be
    ESP-413 not one input, output   ESP-417 attribute out of range
"""

import difflib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from typing import Literal
from typing import NoReturn

from pydantic import Field
from pydantic import JsonValue
from pydantic import ValidationError

from esper.contracts.base import Contract
from esper.errors import BlueprintError
from esper.runtime.tezzeret.operations.kinds import MAX_DIMENSION
from esper.runtime.tezzeret.operations.kinds import Buffer
from esper.runtime.tezzeret.operations.kinds import Shape
from esper.runtime.tezzeret.operations.kinds import ShapeError
from esper.runtime.tezzeret.operations.table import OPERATIONS

INPUT = "x"
MAX_NODES = 16
MAX_DEPTH = 12
"""The most nodes on one way from the input to the output."""
MAX_JSON_BYTES = 256 * 1024
MAX_JSON_DEPTH = 64
MAX_RANK = 8
MAX_ELEMENTS = 2**31
"""The most elements that one sample may have anywhere in a graph."""
NODE_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class KernelNode(Contract):
    """One operation: `inputs` are ids of other nodes or `x`."""

    id: str
    op: str
    inputs: tuple[str, ...]
    attributes: dict[str, JsonValue] = Field(default_factory=dict)


class KernelGraph(Contract):
    """A kernel as data. `inputs` maps the one input `x` to the shape of one sample of it.

    Instances that come from `parse_graph` keep every rule; any other passes `check_graph` before it is used.
    """

    schema_version: Literal[1] = 1
    inputs: dict[str, tuple[int, ...]]
    nodes: tuple[KernelNode, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class TypedNode:
    """A node whose attributes, input shapes and output shape are known to be right."""

    id: str
    op: str
    inputs: tuple[str, ...]
    attributes: Any
    shapes: tuple[Shape, ...]
    output: Shape

    def tensors(self) -> Mapping[str, Shape]:
        """The node's trainable tensors, without the node's name."""
        return OPERATIONS[self.op].tensors(self.attributes, self.shapes)

    def buffers(self) -> Mapping[str, Buffer]:
        """What the node keeps beside them, without the node's name."""
        return OPERATIONS[self.op].buffers(self.attributes, self.shapes)


@dataclass(frozen=True)
class TypedGraph:
    """A checked graph: `nodes` in an order in which each one's inputs stand before it."""

    graph: KernelGraph
    nodes: tuple[TypedNode, ...]
    input_shape: Shape
    output: str
    output_shape: Shape

    def __deepcopy__(self, memo: object) -> "TypedGraph":
        # Nothing in it changes: copies of a kernel share what was found out about its graph.
        return self

    def tensors(self) -> dict[str, Shape]:
        """Every trainable tensor as `<node>.<tensor>` with its shape, in order of the nodes."""
        return {f"{node.id}.{name}": shape for node in self.nodes for name, shape in node.tensors().items()}

    def buffers(self) -> dict[str, Buffer]:
        """Everything that is kept and not trained, as `<node>.<tensor>`, in order of the nodes."""
        return {f"{node.id}.{name}": buffer for node in self.nodes for name, buffer in node.buffers().items()}

    def stored(self, dtype: str) -> dict[str, tuple[str, Shape]]:
        """Everything that a kernel of this dtype stores: the dtype and shape of each tensor and buffer."""
        tensors = {name: (dtype, shape) for name, shape in self.tensors().items()}
        buffers = {name: ("int64" if kept.counts else dtype, kept.shape) for name, kept in self.buffers().items()}
        return tensors | buffers

    @property
    def reads_ids(self) -> bool:
        """Whether `x` is whole numbers (the rows of an embedding) and not floating."""
        return any(INPUT in node.inputs and OPERATIONS[node.op].reads_ids for node in self.nodes)

    @property
    def parameter_count(self) -> int:
        """Trainable numbers."""
        return sum(math.prod(shape) for shape in self.tensors().values())

    @property
    def flops_per_sample(self) -> int:
        """Floating point operations of the matrix products for one sample, forward."""
        return sum(OPERATIONS[n.op].flops(n.attributes, n.shapes, n.output) for n in self.nodes)


def canonical_json(value: object) -> bytes:
    """The one spelling of a JSON value: sorted keys, no spaces, UTF-8, no NaN. Digests are taken over this."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def strict_json(data: bytes, *, where: str, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read one JSON object and nothing else. Raises BlueprintError ESP-420 on what is not one: size above
    `limit`, invalid UTF-8, trailing bytes, lone surrogates, doubled keys, NaN, depth above 64."""
    document = _load(data, where=where, limit=limit)
    _require_plain(document, where=where)
    return document


def parse_graph(
    source: bytes | Mapping[str, object], *, max_parameters: int | None = None, max_flops: int | None = None
) -> KernelGraph:
    """A graph from outside, by all rules of this module. Raises BlueprintError ESP-410..420."""
    if not isinstance(source, bytes):
        if isinstance(given := source.get("nodes"), list):
            _check_node_count(len(given))
        try:
            source = json.dumps(dict(source)).encode()
        except (TypeError, ValueError, RecursionError) as error:
            _refuse("ESP-420", f"graph: not JSON: {error}")
    document = _load(source, where="graph", limit=MAX_JSON_BYTES)
    nodes = document.get("nodes")
    if isinstance(nodes, list):
        # Before the schema, so that a graph of 10^5 nodes costs one comparison.
        _check_node_count(len(nodes))
        for index, node in enumerate(nodes):
            if not _finite(node):
                _refuse("ESP-417", f"node {index}{_node_name(document, ('nodes', index))}: numbers must be finite")
    _require_plain(document, where="graph")
    try:
        graph = KernelGraph.model_validate_json(canonical_json(document))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = shown(".".join(str(part) for part in first["loc"]) or "graph")
        _refuse("ESP-419", f"graph at {place}{_node_name(document, first['loc'])}: {first['msg']}")
    check_graph(graph, max_parameters=max_parameters, max_flops=max_flops)
    return graph


def check_graph(graph: KernelGraph, *, max_parameters: int | None = None, max_flops: int | None = None) -> TypedGraph:
    """Type a graph: all rules, shape inference, budgets (`max_flops` is of one sample, forward). Nothing is
    allocated. Raises BlueprintError ESP-410..418."""
    _check_node_count(len(graph.nodes))
    input_shape = _check_input(graph)
    by_id: dict[str, KernelNode] = {}
    for node in graph.nodes:
        if not NODE_ID.fullmatch(node.id) or node.id == INPUT:
            _refuse("ESP-418", f"node {shown(node.id)}: an id is 1 to 64 of [A-Za-z0-9_-] and not '{INPUT}'")
        if node.id in by_id:
            _refuse("ESP-418", f"node {shown(node.id)}: the id is given twice")
        by_id[node.id] = node
    if len(graph.outputs) != 1:
        _refuse("ESP-413", f"graph: {len(graph.outputs)} outputs, there must be exactly 1")
    (output,) = graph.outputs
    if output not in by_id:
        _refuse("ESP-412", f"graph: output {shown(output)} is no node")
    attributes = {node.id: _check_node(node, by_id) for node in graph.nodes}
    typed: dict[str, TypedNode] = {}
    depths = {INPUT: 0}
    for node in _ordered(graph.nodes):
        shapes = tuple(input_shape if name == INPUT else typed[name].output for name in node.inputs)
        typed[node.id] = _infer(node, attributes[node.id], shapes)
        depths[node.id] = 1 + max(depths[name] for name in node.inputs)
        if depths[node.id] > MAX_DEPTH:
            _refuse("ESP-415", f"node '{node.id}': {depths[node.id]} nodes deep, the limit is {MAX_DEPTH}")
    if not any(INPUT in node.inputs for node in graph.nodes):
        _refuse("ESP-413", f"graph: no node reads the input '{INPUT}'")
    result = TypedGraph(graph, tuple(typed.values()), input_shape, output, typed[output].output)
    _check_ids(result)
    _check_budgets(result, max_parameters, max_flops)
    return result


def parameter_count(graph: KernelGraph) -> int:
    """Trainable numbers of a graph."""
    return check_graph(graph).parameter_count


def flops_per_sample(graph: KernelGraph) -> int:
    """Floating point operations of the matrix products for one sample, forward (two per multiply-accumulate)."""
    return check_graph(graph).flops_per_sample


def _check_ids(typed: TypedGraph) -> None:
    for node in typed.nodes:
        ids = OPERATIONS[node.op].reads_ids
        if ids and node.inputs != (INPUT,):
            _refuse("ESP-414", f"node '{node.id}': {node.op} reads ids, which only '{INPUT}' can be")
        if not ids and typed.reads_ids and INPUT in node.inputs:
            _refuse("ESP-414", f"node '{node.id}': {node.op} reads numbers, '{INPUT}' is ids for another node")


def _check_budgets(typed: TypedGraph, max_parameters: int | None, max_flops: int | None) -> None:
    if max_parameters is not None and typed.parameter_count > max_parameters:
        sizes = {name: math.prod(shape) for name, shape in typed.tensors().items()}
        largest = max(sizes, key=lambda name: sizes[name])
        _refuse(
            "ESP-416",
            f"node '{largest.partition('.')[0]}': the graph has {typed.parameter_count} parameters, "
            f"the budget is {max_parameters}",
            hint="give a smaller rank or raise tezzeret.max_parameters",
        )
    if max_flops is not None and typed.flops_per_sample > max_flops:
        costs = {n.id: OPERATIONS[n.op].flops(n.attributes, n.shapes, n.output) for n in typed.nodes}
        largest = max(costs, key=lambda name: costs[name])
        _refuse(
            "ESP-416",
            f"node '{largest}': the graph takes {typed.flops_per_sample} floating point operations a sample, "
            f"the budget is {max_flops}",
            hint="give a smaller rank or a larger budget",
        )


def _check_node_count(count: int) -> None:
    if not 1 <= count <= MAX_NODES:
        _refuse("ESP-415", f"graph: {count} nodes, there must be 1 to {MAX_NODES}")


def _check_input(graph: KernelGraph) -> Shape:
    if set(graph.inputs) != {INPUT}:
        names = ", ".join(shown(name) for name in sorted(graph.inputs)[:4]) or "none"
        _refuse("ESP-413", f"graph: inputs {names}, there must be exactly one and it is '{INPUT}'")
    shape = graph.inputs[INPUT]
    if len(shape) > MAX_RANK:
        _refuse("ESP-417", f"graph: the input has {len(shape)} dimensions, allowed are up to {MAX_RANK}")
    if any(not 1 <= size <= MAX_DIMENSION for size in shape) or math.prod(shape) > MAX_ELEMENTS:
        _refuse("ESP-417", f"graph: input shape {shape}: sizes are 1 to {MAX_DIMENSION}, elements up to {MAX_ELEMENTS}")
    return shape


def _check_node(node: KernelNode, by_id: Mapping[str, KernelNode]) -> Contract:
    operation = OPERATIONS.get(node.op)
    if operation is None:
        near = difflib.get_close_matches(node.op, OPERATIONS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(OPERATIONS)}"
        _refuse("ESP-410", f"node '{node.id}': unknown operation {shown(node.op)}", hint=hint)
    if len(node.inputs) != operation.arity:
        what = "input" if operation.arity == 1 else "inputs"
        _refuse("ESP-412", f"node '{node.id}': {node.op} takes {operation.arity} {what}, {len(node.inputs)} given")
    for name in node.inputs:
        if name != INPUT and name not in by_id:
            _refuse("ESP-412", f"node '{node.id}': input {shown(name)} is neither '{INPUT}' nor a node")
    try:
        return operation.attributes.model_validate_json(canonical_json(node.attributes))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = str(first["loc"][0]) if first["loc"] else node.op
        _refuse("ESP-417", f"node '{node.id}': attribute {shown(place)}: {first['msg']}")


def _infer(node: KernelNode, attributes: Contract, shapes: tuple[Shape, ...]) -> TypedNode:
    try:
        output = OPERATIONS[node.op].infer(attributes, shapes)
    except ShapeError as error:
        _refuse("ESP-414", f"node '{node.id}': {error}")
    if math.prod(output) > MAX_ELEMENTS:
        _refuse("ESP-417", f"node '{node.id}': {math.prod(output)} elements a sample, the limit is {MAX_ELEMENTS}")
    return TypedNode(node.id, node.op, node.inputs, attributes, shapes, output)


def _ordered(nodes: tuple[KernelNode, ...]) -> tuple[KernelNode, ...]:
    """Kahn's order; ties stay in the order of the graph."""
    done: set[str] = {INPUT}
    waiting = list(nodes)
    ordered: list[KernelNode] = []
    while waiting:
        ready = next((node for node in waiting if done.issuperset(node.inputs)), None)
        if ready is None:
            _refuse("ESP-411", f"node '{waiting[0].id}': in a cycle of {', '.join(n.id for n in waiting)}")
        waiting.remove(ready)
        done.add(ready.id)
        ordered.append(ready)
    return tuple(ordered)


def _depth(text: str) -> int:
    """How deep brackets nest outside of strings: json.loads would recurse first and ask later."""
    depth = deepest = 0
    in_string = escaped = False
    for character in text:
        if escaped:
            escaped = False
        elif in_string:
            escaped = character == "\\"
            in_string = character != '"'
        elif character == '"':
            in_string = True
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {shown(doubled)} is given twice")
    return result


def _load(data: bytes, *, where: str, limit: int) -> dict[str, Any]:
    if len(data) > limit:
        _refuse("ESP-420", f"{where}: {len(data)} bytes, the limit is {limit}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse("ESP-420", f"{where}: not UTF-8 at byte {error.start}")
    if _depth(text) > MAX_JSON_DEPTH:
        _refuse("ESP-420", f"{where}: nested deeper than {MAX_JSON_DEPTH}")
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except ValueError as error:
        _refuse("ESP-420", f"{where}: not JSON: {error}")
    if not isinstance(value, dict):
        _refuse("ESP-420", f"{where}: must be an object, is {type(value).__name__}")
    return value


def _require_plain(value: dict[str, Any], *, where: str) -> None:
    try:
        canonical_json(value)
    except UnicodeEncodeError:
        _refuse("ESP-420", f"{where}: a lone surrogate is not text")
    except ValueError:
        _refuse("ESP-420", f"{where}: NaN and infinity are not JSON numbers")


def _finite(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(_finite(item) for item in value.values())
    return all(_finite(item) for item in value) if isinstance(value, list) else True


def _node_name(document: Mapping[str, Any], location: tuple[int | str, ...]) -> str:
    if len(location) < 2 or location[0] != "nodes" or not isinstance(location[1], int):
        return ""
    node = document["nodes"][location[1]]
    return f" (node {shown(node['id'])})" if isinstance(node, dict) and isinstance(node.get("id"), str) else ""


def shown(text: str) -> str:
    """A name from outside as it may stand in a message: quoted, printable ASCII, cut."""
    shown = ascii(text)
    return shown if len(shown) <= 80 else shown[:76] + "...'"


def _refuse(code: str, message: str, *, hint: str | None = None) -> NoReturn:
    raise BlueprintError(code, message, hint=hint)
