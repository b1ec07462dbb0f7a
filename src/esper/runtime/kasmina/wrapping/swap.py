"""Changing the class of a live module in place, below classes that others put on it, and back exactly.

This is what keeps identity, names, hooks and type of every module (`torch.nn.utils.parametrize` and FSDP2 do the
same): the swapped class is a dynamic subclass (Base, Mixin) that carries the name of Base.
"""

import dis
import functools
import inspect
import types
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

from torch import nn

from esper.errors import SiteError

ForwardOver = Callable[[type[nn.Module]], Callable[..., Any]]
"""Makes the overriding forward of a swapped class over its base."""

CHILD = "kasmina"
"""The child of a site that holds what is grown there."""

_MIXED: dict[tuple[type, type], type[nn.Module]] = {}
"""Every dynamic class that was made: one for each class and mixin, so that copies of a layer keep one type."""

_CHAIN_MODULES = ("torch.nn.utils.parametrize",)
"""Modules whose dynamic classes sit on top of a layer's own class: ours goes below them."""


def own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class without the dynamic classes of parametrizations on top of it."""
    return _split(type(module))[1]


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that the user gave the module, whatever has been put onto it since."""
    cls = own_class(module)
    base: type[nn.Module] = cls.__dict__.get("_esper_base", cls)
    return base


def swap(module: nn.Module, mixin: type, forward: ForwardOver | None) -> None:
    """Put `mixin` onto one module. `forward(base)` makes the overriding forward, if there is one."""
    chain, base = _split(type(module))
    module.__class__ = _rebuilt(chain, mixed_class(base, mixin, forward))


def swap_back(module: nn.Module, mixin: type) -> None:
    """Take `mixin` off again; whatever was put on top of it since then stays on top."""
    chain, mixed = _split(type(module))
    base = mixed.__dict__["_esper_base"] if mixin in mixed.__bases__ else mixed
    module.__class__ = _rebuilt(chain, base)


def mixed_class(base: type[nn.Module], mixin: type, forward: ForwardOver | None) -> type[nn.Module]:
    """The dynamic subclass of `base`: one for all modules of that class. Raises SiteError ESP-314 for a class
    that cannot be subclassed so."""
    found = _MIXED.get((base, mixin))
    if found is not None:
        return found
    _check(base)

    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        # A fresh instance (a slice of a Sequential, a clone by type) is an ordinary one: it has no seeds.
        self.__class__ = base
        base.__init__(self, *args, **kwargs)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # The dynamic class cannot be found by name: what travels is its recipe.
        return (rebuild, (base, mixin, forward), self.__getstate__())  # type: ignore[no-untyped-call]

    namespace: dict[str, Any] = {
        "__init__": __init__,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_esper_base": base,
    }
    if forward is not None:
        namespace["forward"] = functools.wraps(base.forward)(forward(base))
        if issubclass(base, nn.Sequential):
            namespace |= _items_without(base, CHILD)
    made = types.new_class(base.__name__, (base, mixin), exec_body=lambda ns: ns.update(namespace))
    return _MIXED.setdefault((base, mixin), made)


def _items_without(base: type[nn.Module], child: str) -> dict[str, Any]:
    """What makes a Sequential with one more child go on being the sequence of its own modules."""

    def items(self: nn.Module) -> list[tuple[str, Any]]:
        return [(name, module) for name, module in self._modules.items() if name != child]

    def __iter__(self: nn.Module) -> Iterator[Any]:
        return iter([module for _, module in items(self)])

    def __len__(self: nn.Module) -> int:
        return len(items(self))

    def __getitem__(self: nn.Module, index: Any) -> Any:
        if isinstance(index, slice):
            return base(OrderedDict(items(self)[index]))
        return items(self)[index][1]

    return {"__iter__": __iter__, "__len__": __len__, "__getitem__": __getitem__}


def rebuild(base: type[nn.Module], mixin: type, forward: ForwardOver | None) -> nn.Module:
    """An empty instance of the dynamic class, whose state is set next: how copies and unpickled models begin."""
    cls = mixed_class(base, mixin, forward)
    return cls.__new__(cls)


def _split(cls: type[nn.Module]) -> tuple[list[type[nn.Module]], type[nn.Module]]:
    chain: list[type[nn.Module]] = []
    while cls.__module__ in _CHAIN_MODULES and cls.__name__.startswith("Parametrized"):
        chain.append(cls)
        cls = cls.__bases__[0]
    return chain, cls


def _rebuilt(chain: list[type[nn.Module]], cls: type[nn.Module]) -> type[nn.Module]:
    for upper in reversed(chain):
        namespace = {k: v for k, v in upper.__dict__.items() if k not in ("__dict__", "__weakref__")}
        cls = type(upper.__name__, (cls,), namespace)
    return cls


def _check(base: type[nn.Module]) -> None:
    where = f"{base.__module__}.{base.__qualname__}"
    hook = base.__init_subclass__
    required = [
        p.name
        for p in (inspect.signature(hook).parameters.values() if inspect.ismethod(hook) else ())
        if p.default is p.empty and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if required:
        raise SiteError(
            "ESP-314",
            f"{where} cannot be wrapped: its __init_subclass__ requires {', '.join(required)}",
            hint="give those keywords a default, or leave the layer out with exclude=",
        )
    for cls in base.__mro__:
        if not issubclass(cls, nn.Module) or cls.__module__.startswith("torch."):
            continue
        for name, function in vars(cls).items():
            if isinstance(function, types.FunctionType) and _asks_own_class_for_super(function):
                raise SiteError(
                    "ESP-314",
                    f"{where} cannot be wrapped: {cls.__qualname__}.{name} calls super(self.__class__, ...), which "
                    "recurses for ever in every subclass",
                    hint="write super() there, or leave the layer out with exclude=",
                )


def _asks_own_class_for_super(function: types.FunctionType) -> bool:
    if "super" not in function.__code__.co_names or "__class__" not in function.__code__.co_names:
        return False
    names = [step.argval for step in dis.get_instructions(function) if step.opname.startswith("LOAD_")]
    return any(a == "super" and c == "__class__" for a, c in zip(names, names[2:], strict=False))
