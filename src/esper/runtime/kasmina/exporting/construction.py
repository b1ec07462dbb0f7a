"""Modules as the Python that makes them again: a class of `torch.nn` as one call, anything else as what holds it."""

import inspect
import keyword
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import Literal

import torch
from torch import Tensor
from torch import nn

from esper.runtime.kasmina.exporting.literals import Unwritable
from esper.runtime.kasmina.exporting.literals import literal

_RECURRENT = ("num_layers", "nonlinearity", "bias", "batch_first", "dropout", "bidirectional", "proj_size")
_NOT_OURS = ("device", "dtype")
_EMPTY: Any = inspect.Parameter.empty


def constructor_of(module: nn.Module) -> str | None:
    """`nn.Linear(in_features=6, out_features=5)` for a module that this call makes again; None for any other.

    Proven, not assumed: the call is made (on the meta device) and must give the same settings and the same names
    and shapes of tensors. A module with hooks is none: they would be lost.
    """
    kind = type(module)
    if getattr(nn, kind.__name__, None) is not kind or isinstance(module, _CONTAINERS) or _has_hooks(module):
        return None
    try:
        required, optional = _arguments(module)
        if not _makes(module, required, optional):
            return None
        for name in list(optional):
            fewer = {other: value for other, value in optional.items() if other != name}
            optional = fewer if _makes(module, required, fewer) else optional
        texts = [*map(literal, required), *(f"{name}={literal(value)}" for name, value in optional.items())]
    # A class whose attributes are not what its constructor takes may raise anything.
    except Exception:
        return None
    return f"nn.{kind.__name__}({', '.join(texts)})"


def _makes(module: nn.Module, required: list[Any], optional: dict[str, Any]) -> bool:
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = type(module)(*required, **optional)
    except (TypeError, ValueError):
        return False
    return _settings(again) == _settings(module)


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def _arguments(module: nn.Module) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of the constructor that it cannot do without, and those that it can."""
    if isinstance(module, nn.RNNBase):
        return [module.input_size, module.hidden_size], {
            name: getattr(module, name) for name in _RECURRENT if hasattr(module, name)
        }
    required, optional = [], {}
    for name, parameter in inspect.signature(type(module)).parameters.items():
        if name in _NOT_OURS or name.startswith("_") or parameter.kind not in _BY_NAME:
            continue
        value = _setting(module, name)
        if parameter.default is _EMPTY:
            required.append(value)
        elif value is not _EMPTY:
            optional[name] = value
    return required, optional


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _setting(module: nn.Module, name: str) -> Any:
    """What a constructor's argument was, by the attribute of that name; for a tensor, whether there is one."""
    if isinstance(module, nn.MultiheadAttention) and name in ("bias", "add_bias_kv"):
        return (module.in_proj_bias if name == "bias" else module.bias_k) is not None
    if name in module._parameters or name in module._buffers:
        return getattr(module, name) is not None
    return getattr(module, name, _EMPTY)


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """Everything about a module that decides over what it computes, but for the values of its tensors."""
    plain = {
        name: value
        for name, value in module.__dict__.items()
        if not name.startswith("_") and name != "training" and not isinstance(value, Tensor | nn.Module)
    }
    tensors = [(name, tuple(tensor.shape)) for name, tensor in _own_and_below(module)]
    return type(module), plain, tensors, [(name, type(child)) for name, child in module.named_modules()]


def _own_and_below(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _has_hooks(module: nn.Module) -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(part, name, None) for part in module.modules() for name in names)


@dataclass
class Construction:
    """The lines of an `__init__` that make a module tree with the names of `model`, and how each part is reached."""

    model: nn.Module
    lines: list[str] = field(default_factory=list)
    paths: dict[str, str] = field(default_factory=dict)
    """Dotted name -> Python, for every module and every tensor."""

    def __post_init__(self) -> None:
        self._modules: dict[int, str] = {}
        self._tensors: dict[int, str] = {}
        self.paths[""] = "self"
        self._fill("", "self", self.model)

    def _fill(self, name: str, path: str, module: nn.Module) -> None:
        """Everything inside of a module that is not made by one call."""
        self._modules[id(module)] = path
        for own, tensor in [*module._parameters.items(), *module._buffers.items()]:
            self._own_tensor(_join(name, own), path, own, tensor, module)
        made = module is not self.model and _form(module) != "attributes"
        for own, child in module._modules.items():
            if child is None:
                continue
            inner, place = _join(name, own), self._reach(path, own, module)
            self.paths[inner] = place
            known = self._modules.get(id(child))
            if known is not None:
                self._put(path, own, place, [known])
                self._name_again(inner, place, child)
                continue
            if not made:
                self._put(path, own, place, self._expression(child))
            if constructor_of(child) is None:
                self._fill(inner, place, child)
            else:
                self._leaf(inner, place, child)

    def _put(self, path: str, own: str, place: str, lines: list[str]) -> None:
        if place.startswith("getattr("):
            self.lines += [f"{path}.add_module({literal(own)}, {lines[0]}", *lines[1:]]
            self.lines[-1] += ")"
        else:
            self.lines += [f"{place} = {lines[0]}", *lines[1:]]

    def _expression(self, module: nn.Module) -> list[str]:
        """The lines of one expression that makes a module and, for lists and dictionaries, its children."""
        made = constructor_of(module)
        if made is not None:
            return [made + _cast(module)]
        form = _form(module)
        if form == "attributes" or not module._modules:
            return ["nn.ModuleList()"] if form == "list" else ["nn.Module()"]
        parts: list[str] = []
        for own, child in module._modules.items():
            # One that stands elsewhere already is put in its place by a line of its own.
            lines = ["nn.Module()"] if child is None or id(child) in self._modules else self._expression(child)
            lines = [*lines[:-1], lines[-1] + ","]
            begin = lines[0] if form == "list" else f"{literal(own)}: {lines[0]}"
            parts += [f"    {line}" for line in (begin, *lines[1:])]
        first, last = ("nn.ModuleList([", "])") if form == "list" else ("nn.ModuleDict({", "})")
        return [first + parts[0].strip().rstrip(",") + last] if len(parts) == 1 else [first, *parts, last]

    def _leaf(self, name: str, path: str, module: nn.Module) -> None:
        self._modules[id(module)] = path
        for inner, tensor in _own_and_below(module):
            place = f"{path}.{inner}"
            self.paths[_join(name, inner)] = place
            known = self._tensors.get(id(tensor))
            if known is not None:
                self.lines.append(f"{place} = {known}")
                continue
            self._tensors[id(tensor)] = place
            if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
                self.lines.append(f"{place}.requires_grad_(False)")

    def _own_tensor(self, name: str, path: str, own: str, tensor: Tensor | None, module: nn.Module) -> None:
        place = _attribute(path, own)
        self.paths[name] = place
        known = None if tensor is None else self._tensors.get(id(tensor))
        if known is None and tensor is not None:
            self._tensors[id(tensor)] = place
        if own in module._parameters:
            made = known or _parameter(tensor)
            plain = own.isidentifier() and not keyword.iskeyword(own)
            self.lines.append(
                f"{path}.{own} = {made}" if plain else f"{path}.register_parameter({literal(own)}, {made})"
            )
            return
        kept = "" if own not in module._non_persistent_buffers_set else ", persistent=False"
        made = known or ("None" if tensor is None else _empty(tensor))
        self.lines.append(f"{path}.register_buffer({literal(own)}, {made}{kept})")

    def _name_again(self, name: str, path: str, module: nn.Module) -> None:
        """A module that is reached by a second name: what is in it has that name too."""
        for own in (*module._parameters, *module._buffers):
            self.paths[_join(name, own)] = _attribute(path, own)
        for own, child in module._modules.items():
            if child is not None:
                place = self._reach(path, own, module) if constructor_of(module) is None else _attribute(path, own)
                self.paths[_join(name, own)] = place
                self._name_again(_join(name, own), place, child)

    def _reach(self, path: str, own: str, parent: nn.Module) -> str:
        form = "attributes" if parent is self.model else _form(parent)
        if form == "attributes":
            return _attribute(path, own)
        return f"{path}[{own}]" if form == "list" else f"{path}[{literal(own)}]"


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _attribute(path: str, name: str) -> str:
    plain = name.isidentifier() and not keyword.iskeyword(name)
    return f"{path}.{name}" if plain else f"getattr({path}, {literal(name)})"


def _form(module: nn.Module) -> Literal["list", "dictionary", "attributes"]:
    """How the children of a module are written: numbered ones as a list, ones whose names are no attributes' as a
    dictionary."""
    names = list(module._modules)
    if names == [str(index) for index in range(len(names))]:
        if names or isinstance(module, nn.ModuleList | nn.Sequential):
            return "list"
        return "attributes"
    plain = all(name.isidentifier() and not keyword.iskeyword(name) for name in names)
    return "attributes" if plain else "dictionary"


def _cast(module: nn.Module) -> str:
    kinds = {tensor.dtype for _, tensor in _own_and_below(module) if tensor.is_floating_point()}
    if kinds <= {torch.float32}:
        return ""
    if len(kinds) > 1:
        raise Unwritable(f"a {type(module).__name__} with tensors of {len(kinds)} dtypes")
    return f".to({kinds.pop()})"


def _empty(tensor: Tensor) -> str:
    kind = "" if tensor.dtype is torch.float32 else f", dtype={tensor.dtype}"
    return f"torch.zeros({tuple(tensor.shape)!r}{kind})"


def _parameter(tensor: Tensor | None) -> str:
    if tensor is None:
        return "None"
    frozen = "" if tensor.requires_grad else ", requires_grad=False"
    return f"nn.Parameter({_empty(tensor)}{frozen})"
