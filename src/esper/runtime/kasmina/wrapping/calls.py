"""What a kernel sees of one call of its host: which argument is `x`, and which tensor of the result is the output.

The documented choices: `x` of a layer is its first argument; `x` of a block is the first floating tensor among the
positional, then the keyword arguments (tuples, lists and mappings looked into in order) that has the output's shape.
The output is what the module returns, or the first floating tensor in the tuple, list, mapping or dataclass that it
returns; everything else in it is passed on as it is.
"""

import copy
import dataclasses
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

from torch import Tensor

Place = tuple[Any, ...]
"""Where in a nested result a tensor is: indices, keys and field names from the outside in."""


def taken(returned: Any) -> tuple[Tensor, Place] | None:
    """The output in what a module returned, and where it is; None where there is no floating tensor in it."""
    if isinstance(returned, Tensor):
        return (returned, ()) if returned.is_floating_point() else None
    for key, part in _parts(returned):
        found = taken(part)
        if found is not None:
            return found[0], (key, *found[1])
    return None


def put_back(returned: Any, place: Place, output: Tensor) -> Any:
    """The result with another tensor at that place: a new container of the same type, all else the same objects."""
    if not place:
        return output
    key = place[0]
    if dataclasses.is_dataclass(returned) and not isinstance(returned, type):
        return dataclasses.replace(returned, **{key: put_back(getattr(returned, key), place[1:], output)})
    inner = put_back(returned[key], place[1:], output)
    if isinstance(returned, Mapping):
        if type(returned) is dict:
            return {**returned, key: inner}
        changed: Any = copy.copy(returned)
        changed[key] = inner
        return changed
    items = [inner if index == key else item for index, item in enumerate(returned)]
    if isinstance(returned, tuple) and hasattr(returned, "_fields"):
        return type(returned)(*items)
    return tuple(items) if isinstance(returned, tuple) else items


def argument(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first argument of a call, by position or by its name (else the first tensor among the keywords)."""
    found = args[0] if args else kwargs.get(name)
    if isinstance(found, Tensor):
        return found
    return next(argument_tensors((*args, *kwargs.values())), None)


def same_shape(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor | None:
    """The first floating tensor among the arguments that has the output's shape."""
    if output.is_nested:
        return None
    return next(
        (
            tensor
            for tensor in argument_tensors((*args, *kwargs.values()))
            if tensor.is_floating_point() and not tensor.is_nested and tensor.shape == output.shape
        ),
        None,
    )


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a result: of tuples, lists, mappings and dataclasses, in their order."""
    if isinstance(value, Tensor):
        yield value
    else:
        for _, part in _parts(value):
            yield from tensors_in(part)


def argument_tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors that `x` is chosen from: of tuples, lists and mappings, in order. Dataclasses are passed over."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from argument_tensors(value.values())
        elif isinstance(value, tuple | list):
            yield from argument_tensors(value)


def _parts(returned: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(returned, Mapping):
        return returned.items()
    if isinstance(returned, tuple | list):
        return enumerate(returned)
    if dataclasses.is_dataclass(returned) and not isinstance(returned, type):
        return ((field.name, getattr(returned, field.name)) for field in dataclasses.fields(returned))
    return ()
