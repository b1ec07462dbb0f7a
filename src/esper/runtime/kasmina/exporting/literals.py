"""Values as Python source: what may stand in generated code, and nothing that would have to be imported."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx


class Unwritable(Exception):
    """A value or an operation that has no form in code that imports torch only."""


@dataclass(frozen=True)
class Switch:
    """A constant that a model's own forward gives differently in evaluation and in training mode."""

    evaluating: bool | int | float | None
    training: bool | int | float | None


def literal(value: Any, names: Mapping[fx.Node, str] = MappingProxyType({})) -> str:
    """The expression that makes `value` again: nodes of a graph by `names`, else their own; everything else exactly.
    Raises Unwritable."""
    if isinstance(value, fx.Node):
        return names.get(value, value.name)
    if isinstance(value, Switch):
        if (value.evaluating, value.training) == (False, True) and isinstance(value.training, bool):
            return "self.training"
        return f"({literal(value.training)} if self.training else {literal(value.evaluating)})"
    if isinstance(value, str):
        text = repr(value)
        return f'"{text[1:-1]}"' if text[0] == "'" and '"' not in text else text
    if value is None or value is Ellipsis or isinstance(value, bool | int):
        return "..." if value is Ellipsis else repr(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else f'float("{value}")'
    if isinstance(value, complex):
        return repr(value)
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return str(value)
    if isinstance(value, torch.device):
        return f"torch.device({literal(str(value))})"
    if isinstance(value, slice):
        return f"slice({', '.join(literal(part, names) for part in (value.start, value.stop, value.step))})"
    if isinstance(value, tuple):
        inner = [literal(item, names) for item in value]
        return f"({inner[0]},)" if len(inner) == 1 else f"({', '.join(inner)})"
    if isinstance(value, list):
        return f"[{', '.join(literal(item, names) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(key)}: {literal(item, names)}" for key, item in value.items()) + "}"
    raise Unwritable(f"a value of type {type(value).__module__}.{type(value).__qualname__}")
