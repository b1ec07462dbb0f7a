"""A traced graph as the lines of a `forward`: one statement for each node, with Python's own operators."""

import builtins
import math
import operator
import re
from collections.abc import Iterator
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from esper.runtime.kasmina.exporting.literals import Unwritable
from esper.runtime.kasmina.exporting.literals import literal

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**", "matmul": "@",
    "and_": "&", "or_": "|", "xor": "^", "lshift": "<<", "rshift": ">>",
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
}  # fmt: skip
_PREFIX = {"neg": "-", "pos": "+", "invert": "~", "inv": "~", "not_": "not "}
_HOMES: tuple[tuple[str, ModuleType], ...] = (
    ("F", torch.nn.functional),
    ("torch", torch),
    ("torch.special", torch.special),
    ("torch.linalg", torch.linalg),
    ("torch.fft", torch.fft),
    ("torch._C._nn", torch._C._nn),
)
_TORCH_NAMESPACES = ("aten", "prims", "quantized")
Names = Mapping[fx.Node, str]
RESERVED = frozenset({"torch", "nn", "F", "math", "json", "self", "load_model", "read_safetensors"})


def forward_lines(graph: fx.Graph, paths: Mapping[str, str], inputs: Mapping[str, str], result: Any) -> list[str]:
    """The body of `forward`, without indentation. `paths` says how every module and tensor is reached.

    Raises Unwritable for an operation that would need another import than torch.
    """
    _rename(graph)
    reads = {node: paths[str(node.target)] for node in graph.nodes if node.op == "get_attr"}
    lines: list[str] = []
    where = ""
    for node in graph.nodes:
        if node.op == "placeholder" and inputs[node.name] != node.name:
            lines.append(f"{node.name} = {inputs[node.name]}")
        if node.op not in ("call_module", "call_method", "call_function"):
            continue
        here = _origin(node)
        if here != where:
            where = here
            lines += ["", f"# {here}"] if here else [""]
        lines += _statement(node, paths, reads)
    return [*lines[next((i for i, line in enumerate(lines) if line), 0) :], f"return {literal(result, reads)}"]


def uses(lines: list[str]) -> set[str]:
    """Which of the names that a file may import its code uses."""
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    return {name for name in ("F", "math") if re.search(rf"(?<![\w.]){name}\.", text)}


def _rename(graph: fx.Graph) -> None:
    taken = {node.name for node in graph.nodes}
    for node in graph.nodes:
        if node.op != "placeholder" and (node.name in RESERVED or hasattr(builtins, node.name)):
            fresh = next(name for index in range(1, 10**6) if (name := f"{node.name}_{index}") not in taken)
            taken.add(fresh)
            node._rename(fresh)


def _origin(node: fx.Node) -> str:
    """The dotted name of the module whose forward a node is part of; the caller's for one that is a call itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if node.op == "call_module" and stack:
        stack = stack[:-1]
    name = str(stack[-1][0]) if stack else ""
    return "" if name.startswith("_") else name.removeprefix("L['self']").removeprefix(".")


def _statement(node: fx.Node, paths: Mapping[str, str], reads: Names) -> Iterator[str]:
    if node.op == "call_module":
        yield f"{node.name} = {paths[str(node.target)]}({_arguments(node.args, node.kwargs, reads)})"
    elif node.op == "call_method":
        first, rest = node.args[0], node.args[1:]
        yield f"{node.name} = {_operand(first, reads)}.{node.target}({_arguments(rest, node.kwargs, reads)})"
    else:
        yield from _call(node, reads)


def _call(node: fx.Node, reads: Names) -> Iterator[str]:
    target, args = node.target, node.args
    name = getattr(target, "__name__", "")
    sides = [_operand(value, reads) for value in args]
    if getattr(operator, name, None) is target:
        if name in _INFIX and not node.kwargs:
            yield f"{node.name} = {sides[0]} {_INFIX[name]} {sides[1]}"
            return
        if name in _PREFIX:
            yield f"{node.name} = {_PREFIX[name]}{sides[0]}"
            return
        if name == "getitem":
            yield f"{node.name} = {sides[0]}[{_index(args[1], reads)}]"
            return
        if name == "setitem":
            yield f"{sides[0]}[{_index(args[1], reads)}] = {literal(args[2], reads)}"
            return
        if name.startswith("i") and name[1:] in _INFIX:
            # What is added in place to a tensor changes that tensor; a number becomes another one.
            yield f"{node.name} = {sides[0]}"
            yield f"{node.name} {_INFIX[name[1:]]}= {sides[1]}"
            return
    if target is getattr and len(args) == 2 and str(args[1]).isidentifier():
        yield f"{node.name} = {sides[0]}.{args[1]}"
        return
    yield f"{node.name} = {_qualified(target)}({_arguments(args, node.kwargs, reads)})"


def _qualified(target: Any) -> str:
    if isinstance(target, OpOverload):
        namespace = target.namespace
        if namespace not in _TORCH_NAMESPACES:
            raise Unwritable(f"the operation {target}, which is not torch's own")
        return f"torch.ops.{target}"
    name = getattr(target, "__name__", "")
    if getattr(builtins, name, None) is target:
        return name
    home = _homes().get(target) if callable(target) else None
    if home is None:
        raise Unwritable(f"the function {getattr(target, '__module__', '?')}.{name}, which is not torch's own")
    return home


@cache
def _homes() -> dict[Any, str]:
    """Every public function of torch with its shortest name; `math` for numbers."""
    found: dict[Any, str] = {}
    for prefix, module in (*_HOMES, ("math", math)):
        for name in sorted(vars(module)):
            value = getattr(module, name)
            if callable(value) and not isinstance(value, type) and not name.startswith("__"):
                found.setdefault(value, f"{prefix}.{name}")
    return found


def _arguments(args: Any, keywords: Mapping[str, Any], reads: Names) -> str:
    named = (f"{name}={literal(value, reads)}" for name, value in keywords.items())
    return ", ".join([*(literal(value, reads) for value in args), *named])


def _operand(value: Any, reads: Names) -> str:
    text = literal(value, reads)
    return f"({text})" if isinstance(value, int | float | complex) and not text[0].isdigit() else text


def _index(value: Any, reads: Names) -> str:
    if isinstance(value, tuple) and value:
        return ", ".join(_index_part(part, reads) for part in value) + ("," if len(value) == 1 else "")
    return _index_part(value, reads)


def _index_part(value: Any, reads: Names) -> str:
    if not isinstance(value, slice):
        return literal(value, reads)
    parts = ["" if part is None else literal(part, reads) for part in (value.start, value.stop, value.step)]
    return ":".join(parts if parts[2] else parts[:2])
