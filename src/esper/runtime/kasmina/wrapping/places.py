"""Where in the calls of a module its `x` and its output are, as data: what a plain model needs in order to find them
without Esper."""

import dataclasses
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

from torch import Tensor

Key = str | int
Way = tuple[tuple[str, Key], ...]
"""From the outside in: the kind of container (`args`, `kwargs`, `tuple`, `list`, `dict`, `named`, `dataclass`, or the
name of a class that is none of them), and the index, key or field in it."""


def way_to_argument(x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Way | None:
    """Where a tensor is among the arguments of a call; None where it is none of them."""
    for index, value in enumerate(args):
        found = _way_to(x, value)
        if found is not None:
            return (("args", index), *found)
    for name, value in kwargs.items():
        found = _way_to(x, value)
        if found is not None:
            return (("kwargs", name), *found)
    return None


def way_to_output(returned: Any, place: Iterable[Any]) -> Way:
    """The place of the output in what a module returned, with the kinds of the containers on the way."""
    way: list[tuple[str, Key]] = []
    for key in place:
        kind = _container(returned)
        if kind == "named":
            way.append((kind, returned._fields[key]))
        else:
            way.append((kind, key if isinstance(key, str | int) else repr(key)))
        returned = getattr(returned, key) if kind == "dataclass" else returned[key]
    return tuple(way)


def _way_to(x: Tensor, value: Any) -> Way | None:
    if value is x:
        return ()
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, tuple | list):
        items = enumerate(value)
    else:
        return None
    for key, item in items:
        found = _way_to(x, item)
        if found is not None and isinstance(key, str | int):
            return ((_container(value), key), *found)
    return None


def _container(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        return "dataclass"
    if isinstance(value, tuple):
        return "named" if hasattr(value, "_fields") else "tuple"
    if type(value) in (list, dict):
        return type(value).__name__
    return type(value).__qualname__
