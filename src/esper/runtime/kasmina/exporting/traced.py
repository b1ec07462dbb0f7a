"""What a model computes as one graph of torch's own operations, whichever way it was found: `torch.fx`, else
`torch.export`."""

import inspect
import operator
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import fx
from torch import nn
from torch._ops import HigherOrderOperator
from torch.export.graph_signature import InputKind
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree as pytree

from esper.errors import GrowthError
from esper.runtime.kasmina.exporting.construction import constructor_of
from esper.runtime.kasmina.exporting.literals import Switch
from esper.runtime.kasmina.exporting.literals import Unwritable
from esper.runtime.kasmina.exporting.probe import Probe
from esper.runtime.kasmina.exporting.probe import compare
from esper.runtime.kasmina.exporting.quiet import first_line
from esper.runtime.kasmina.exporting.quiet import quietly
from esper.runtime.kasmina.wrapping.calls import tensors_in

_BOOKKEEPING = ("_assert", "sym_constrain", "_guards")
"""Operations of `torch.export` that check and compute nothing."""
_LOOKS = (operator.getitem, getattr, torch.ops.aten.sym_size.int)
_SIZES = ("size", "dim", "numel")


@dataclass(frozen=True)
class Traced:
    """A graph whose nodes are: placeholders (one for each tensor argument), `get_attr` of parameters and buffers of
    the model or of `constants`, calls of leaf modules, functions and methods, and the output.

    `arguments` are the names of the arguments that hold tensors; `inputs` maps each placeholder to where its tensor
    lies in them, as Python. `result` is what the model returns, with nodes where tensors are. `trains` says whether
    the graph also holds in training mode. `way` names how it was found.
    """

    graph: fx.Graph
    arguments: tuple[str, ...]
    inputs: dict[str, str]
    result: Any
    constants: Mapping[str, Tensor]
    trains: bool
    way: str


def trace(model: nn.Module, probe: Probe) -> Traced:
    """The graph of a plain model (on the CPU, in eval mode): by `torch.fx`, and by `torch.export` where that cannot.

    Raises GrowthError ESP-438 with both reasons when neither can.
    """
    reasons = []
    ways: tuple[tuple[str, Callable[[nn.Module, Probe], Traced]], ...] = (
        ("torch.fx", _by_symbols),
        ("torch.export", _by_export),
    )
    for name, way in ways:
        try:
            with quietly():
                return way(model, probe)
        # Tracing runs the user's own forward on stand-ins: it may raise anything.
        except Exception as error:
            reasons.append(f"{name}: {first_line(error)}")
    raise GrowthError(
        "ESP-438",
        f"{type(model).__name__} cannot be written as torch operations alone: {'; '.join(reasons)}",
        hint="give inputs with which it returns tensors only, or export --format safetensors and load that with the "
        "model's own class and esper.load",
    )


class _Tracer(fx.Tracer):
    """Goes into every module but those that can be written as one call of a class of `torch.nn`."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], fixed: Mapping[str, Any]) -> None:
        super().__init__()
        # Before tracing: while it runs, a module's own tensors cannot be read without a trace of it.
        self._leaves = {id(module) for module in model.modules() if constructor_of(module) is not None}
        self._names = names
        self._fixed = fixed

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) in self._leaves

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """One placeholder for each argument that holds tensors; all others are what they were in the probe."""
        proxies = {name: self.create_proxy("placeholder", name, (), {}) for name in self._names}

        def call(root: nn.Module) -> Any:
            return root_fn(root, **proxies, **self._fixed)

        return call, [self.root]


def _by_symbols(model: nn.Module, probe: Probe) -> Traced:
    if probe.args:
        raise Unwritable("its forward has arguments without a name")
    if model._forward_hooks or model._forward_pre_hooks:
        raise Unwritable("it has hooks")
    names = _with_tensors(probe)
    fixed = {name: value for name, value in probe.keywords.items() if name not in names}
    before = dict(model.__dict__)
    try:
        graph = _tidy(_Tracer(model, names, fixed).trace(model))
        constants = _constants(model, graph)
        _require_same(model, graph, constants, {name: probe.keywords[name] for name in names}, probe)
        model.train()
        other = _tidy(_Tracer(model, names, fixed).trace(model))
        trains = _holds_in_training(graph, other, constants, _constants(model, other))
    finally:
        model.eval()
        for name in set(model.__dict__) - set(before):
            del model.__dict__[name]
    inputs = {node.name: str(node.target) for node in graph.nodes if node.op == "placeholder"}
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    return Traced(graph, names, inputs, result, constants, trains, "torch.fx")


def _with_tensors(probe: Probe) -> tuple[str, ...]:
    return tuple(name for name, value in probe.keywords.items() if any(True for _ in tensors_in(value)))


def _constants(model: nn.Module, graph: fx.Graph) -> dict[str, Tensor]:
    """The tensors that a graph reads and that are neither parameters nor buffers."""
    own = set(dict(model.named_parameters(remove_duplicate=False)))
    own |= set(dict(model.named_buffers(remove_duplicate=False)))
    constants: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in own:
            module, _, name = str(node.target).rpartition(".")
            value = getattr(model.get_submodule(module), name)
            if not isinstance(value, Tensor):
                raise Unwritable(f"it reads '{node.target}', a {type(value).__name__}")
            constants[str(node.target)] = value
    return constants


class _Interpreter(fx.Interpreter):
    """Runs a graph with constants that the module does not have."""

    def __init__(self, model: nn.Module, graph: fx.Graph, constants: Mapping[str, Tensor]) -> None:
        super().__init__(model, graph=graph)
        self._constants = constants

    def fetch_attr(self, target: str) -> Any:
        return self._constants[target] if target in self._constants else super().fetch_attr(target)


def _require_same(
    model: nn.Module, graph: fx.Graph, constants: Mapping[str, Tensor], values: Mapping[str, Any], probe: Probe
) -> None:
    """A graph that computes something else than the model (a branch on what only tracing sees) is none."""
    own = {name: tensor.clone() for name, tensor in constants.items()}
    with torch.no_grad():
        found = _Interpreter(model, graph, own).run(*pytree.tree_map(_copy, list(values.values())))
    comparison = compare(probe.outputs, tuple(tensors_in(found)))
    if not comparison.passed:
        raise Unwritable(f"the traced graph computes something else: {comparison.reason}")


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _holds_in_training(
    graph: fx.Graph, other: fx.Graph, constants: Mapping[str, Tensor], others: Mapping[str, Tensor]
) -> bool:
    """Whether the graph of training mode is the same but for constants (a flag, a dropout's probability). Then those
    become a `Switch` in `graph`; else it is left as it is."""
    if len(graph.nodes) != len(other.nodes):
        return False
    pairs = list(zip(graph.nodes, other.nodes, strict=True))
    same = {right: left for left, right in pairs}
    marked = []
    for left, right in pairs:
        constant = left.op == "get_attr" == right.op and left.target in constants
        if left.op != right.op or (left.target != right.target and not constant):
            return False
        if constant and not _equal(constants[str(left.target)], others.get(str(right.target))):
            return False
        try:
            marked.append((left, _merged(left.args, right.args, same), _merged(left.kwargs, right.kwargs, same)))
        except _Different:
            return False
    for node, args, keywords in marked:
        if node.op != "output":
            node.args, node.kwargs = args, keywords
    return True


class _Different(Exception):
    pass


def _equal(left: Tensor, right: Tensor | None) -> bool:
    return right is not None and left.dtype == right.dtype and torch.equal(left, right)


def _merged(left: Any, right: Any, same: Mapping[fx.Node, fx.Node]) -> Any:
    if isinstance(left, fx.Node):
        if same.get(right) is not left:
            raise _Different
        return left
    if all(value is None or isinstance(value, bool | int | float) for value in (left, right)):
        return left if (type(left), left) == (type(right), right) else Switch(left, right)
    if type(left) is not type(right):
        raise _Different
    if isinstance(left, tuple | list):
        if len(left) != len(right):
            raise _Different
        return type(left)(_merged(a, b, same) for a, b in zip(left, right, strict=True))
    if isinstance(left, dict):
        if left.keys() != right.keys():
            raise _Different
        return {key: _merged(left[key], right[key], same) for key in left}
    if isinstance(left, slice):
        parts = [(getattr(left, name), getattr(right, name)) for name in ("start", "stop", "step")]
        return slice(*(_merged(a, b, same) for a, b in parts))
    if left != right:
        raise _Different
    return left


def _by_export(model: nn.Module, probe: Probe) -> Traced:
    found = _program_graph(model, probe)
    _require_same(model, found.graph, found.constants, found.tensors, probe)
    try:
        other = _program_graph(model.train(), probe)
        trains = _holds_in_training(found.graph, other.graph, found.constants, other.constants)
    except Exception:  # what cannot be traced in training mode, for whatever reason, is good for evaluation only
        trains = False
    finally:
        model.eval()
    return Traced(
        found.graph, _with_tensors(probe), found.inputs, found.result, found.constants, trains, "torch.export"
    )


@dataclass(frozen=True)
class _ProgramGraph:
    graph: fx.Graph
    inputs: dict[str, str]
    tensors: dict[str, Tensor]
    constants: dict[str, Tensor]
    result: Any


def _program_graph(model: nn.Module, probe: Probe) -> _ProgramGraph:
    """What `torch.export` finds, with parameters and buffers read where they are used and submodules written out."""
    program = torch.export.export(
        model, probe.args, dict(probe.keywords), dynamic_shapes=every_dimension(model, probe), strict=False
    )
    graph, signature = program.graph, program.graph_signature
    values = {**program.state_dict, **program.constants}
    leaves = iter(pytree.tree_flatten_with_path((probe.args, dict(probe.keywords)))[0])
    inputs: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
    for node, spec in zip([n for n in graph.nodes if n.op == "placeholder"], signature.input_specs, strict=True):
        target = str(spec.target)
        if spec.kind is InputKind.USER_INPUT:
            path, value = next(leaves)
            if isinstance(value, Tensor):
                inputs[node.name], tensors[node.name] = _place(path), value
            elif node.users:
                raise Unwritable(f"it computes with the argument {_place(path)}, which is no tensor")
            else:
                graph.erase_node(node)
            continue
        if spec.kind is InputKind.CONSTANT_TENSOR:
            constants[target] = values[target]
        elif spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER):
            raise Unwritable(f"it needs a {spec.kind.name.lower()}")
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.get_attr(target))
        graph.erase_node(node)
    _write_out(program.graph_module, graph)
    result = _end(program)
    return _ProgramGraph(_tidy(graph), inputs, tensors, constants, result)


def every_dimension(model: nn.Module, probe: Probe) -> Any:
    """For `torch.export`: every dimension of every input may vary, as far as the model lets it."""
    every = torch.export.Dim.AUTO
    args, keywords = pytree.tree_map(
        lambda value: dict.fromkeys(range(value.dim()), every) if isinstance(value, Tensor) else None,
        (probe.args, dict(probe.keywords)),
    )
    if not args:
        return keywords
    return {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **keywords}


def _write_out(owner: nn.Module, graph: fx.Graph) -> None:
    """Replace calls of a region without gradients by what is in it, cut off from the gradient where it ends.
    Raises Unwritable for any other call of a part of the graph (a branch, a loop, autocast)."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
            continue
        name = node.target.__name__
        if name != "wrap_with_set_grad_enabled":
            raise Unwritable(f"a region that torch calls {name}")
        enabled, part, *args = node.args
        inner = getattr(owner, str(part.target))
        _write_out(inner, inner.graph)
        held = dict(zip([n for n in inner.graph.nodes if n.op == "placeholder"], args, strict=True))
        with graph.inserting_before(node):
            values: Any = graph.graph_copy(inner.graph, held)
            if not enabled:
                values = pytree.tree_map(lambda v: graph.call_function(torch.ops.aten.detach.default, (v,)), values)
        for user in list(node.users):
            if user.target is not operator.getitem:
                raise Unwritable(f"a region that torch calls {name} and whose results are used as one")
            user.replace_all_uses_with(values[int(str(user.args[1]))])
            graph.erase_node(user)
        graph.erase_node(node)


def _end(program: torch.export.ExportedProgram) -> Any:
    """The structure that the model returns, with nodes in it; the graph then ends in that."""
    end = next(node for node in program.graph.nodes if node.op == "output")
    nodes: list[Any] = []
    for value, spec in zip(end.args[0], program.graph_signature.output_specs, strict=True):
        if spec.kind is OutputKind.USER_OUTPUT:
            nodes.append(value)
        elif spec.kind is OutputKind.BUFFER_MUTATION:
            with program.graph.inserting_before(end):
                buffer = program.graph.get_attr(str(spec.target))
                program.graph.call_method("copy_", (buffer, value))
        else:
            raise Unwritable(f"it has a {spec.kind.name.lower()}")
    end.args = (tuple(nodes),)
    assert program.call_spec.out_spec is not None
    return _plain(pytree.tree_unflatten(nodes, program.call_spec.out_spec))


def _plain(value: Any) -> Any:
    """A result of the standard library's containers only: mappings become dictionaries, dataclasses too."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [_plain(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, fx.Node) or value is None or isinstance(value, bool | int | float | str):
        return value
    raise Unwritable(f"it returns a {type(value).__module__}.{type(value).__qualname__}")


def _place(path: tuple[Any, ...]) -> str:
    """Where an argument's tensor lies, as Python: `batch['x'][0]`."""
    (kind, first), rest = (path[0].idx, path[1]), path[2:]
    name = str(first.key) if kind else f"arguments[{first.idx}]"
    return name + pytree.keystr(rest)


def _tidy(graph: fx.Graph) -> fx.Graph:
    """Without what nobody uses and changes nothing: reads, sizes, items, and the checks of `torch.export`."""
    for node in reversed(graph.nodes):
        looks = node.op == "get_attr" or node.target in _LOOKS or (node.op == "call_method" and node.target in _SIZES)
        checks = node.op == "call_function" and any(part in str(node.target) for part in _BOOKKEEPING)
        if not node.users and (looks or checks):
            graph.erase_node(node)
    return graph
