"""Which modules of a model become sites: what `target_layers` and `exclude` choose, and what is refused by name."""

import dis
import fnmatch
import itertools
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from esper.errors import SiteError
from esper.runtime.kasmina.wrapping.hosts import HOST_KINDS
from esper.runtime.kasmina.wrapping.hosts import host_kind
from esper.runtime.kasmina.wrapping.hosts import is_uninitialised
from esper.runtime.kasmina.wrapping.hosts import layer_kind
from esper.runtime.kasmina.wrapping.morphable import listed
from esper.runtime.kasmina.wrapping.morphable import near_names
from esper.runtime.kasmina.wrapping.swap import own_class

Target = str | type[nn.Module]

AUTO = "auto"
"""Among targets: every supported layer whose forward is called."""

_WALKS = frozenset({"children", "named_children", "modules", "named_modules", "_modules"})
"""Names by which a forward walks over its own children: it would come across what is grown there."""


@dataclass(frozen=True)
class PlannedSites:
    """The sites by dotted name, in module order; `named` are those that the caller asked for by class, name or glob:
    where one of them turns out never to be called, that is an error."""

    sites: dict[str, nn.Module]
    named: frozenset[str]


def planned_sites(
    model: nn.Module, target_layers: Literal["auto"] | Iterable[Target], exclude: Iterable[Target]
) -> PlannedSites:
    """What is to become a site. A class or glob that matches layers of the table stands for these;
    one that matches none of them stands for blocks. Raises SiteError ESP-314."""
    modules = {name: module for name, module in model.named_modules() if name}
    layers = {name: module for name, module in modules.items() if layer_kind(module) is not None}
    attention = {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    excluded: set[str] = set()
    for pattern in _patterns(exclude):
        found = {name for name, module in modules.items() if _matches(pattern, name, module)}
        if not found and isinstance(pattern, str):
            # A slip here would let grow what must not; a class that this model lacks has nothing to leave out.
            hint = near_names(pattern, layers)
            raise SiteError("ESP-314", f"exclude '{pattern}' matches no layer", hint=hint)
        excluded |= found
    automatic, named = set(), set()
    for pattern in _patterns(target_layers):
        if pattern == AUTO:
            automatic = {
                name
                for name, module in layers.items()
                if id(module) not in attention and "forward" not in module.__dict__ and not hasattr(module, "kasmina")
            }
        else:
            matched = {name: module for name, module in modules.items() if _matches(pattern, name, module)}
            targets = {name for name in matched if name in layers}
            if not targets:
                targets = {name for name, module in matched.items() if host_kind(module) is not None}
            if not targets:
                _refuse_pattern(pattern, matched, modules, layers)
            named |= targets
    chosen = (automatic | named) - excluded
    sites = {name: module for name, module in modules.items() if name in chosen}
    if not sites:
        kinds = sorted({type(module).__name__ for module in modules.values()})
        raise SiteError(
            "ESP-314",
            f"no supported layer is left to grow at in this {type(model).__name__}",
            hint=f"supported: {_supported()}; the model has: {', '.join(kinds) or 'no layers'}; any module whose "
            "output has the shape of its input can be named as a block in target_layers",
        )
    for name, module in sites.items():
        _check_site(name, module, bypassed=id(module) in attention or "forward" in module.__dict__)
    return PlannedSites(sites, frozenset(named & sites.keys()))


def _check_site(name: str, module: nn.Module, *, bypassed: bool) -> None:
    if bypassed:
        raise SiteError(
            "ESP-314",
            f"'{name}' cannot be a site: its forward is bypassed, so that what was grown there would never run",
            hint="leave it out of target_layers",
        )
    if is_uninitialised(module):
        raise SiteError(
            "ESP-314",
            f"'{name}' ({type(module).__name__}) has parameters that are not initialised",
            hint="run the model once before you wrap it",
        )
    if hasattr(module, "kasmina"):
        raise SiteError("ESP-314", f"'{name}' already has an attribute 'kasmina', where grown parts are kept")
    if layer_kind(module) is None:
        _check_block(name, module)


def _check_block(name: str, module: nn.Module) -> None:
    """What a block must not be, because something grown in it would be taken for a part of it, or never run."""
    if isinstance(module, torch.jit.ScriptModule):
        raise SiteError("ESP-314", f"'{name}' is scripted", hint="wrap the model that was scripted")
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
        raise SiteError(
            "ESP-314",
            f"'{name}' is a {type(module).__name__}: what is grown there would be one of its items",
            hint="name the modules inside",
        )
    walks = None if isinstance(module, nn.Sequential) else _walks_over_children(own_class(module))
    if walks is not None:
        raise SiteError(
            "ESP-314",
            f"'{name}' cannot be a site: the forward of {type(module).__name__} uses self.{walks}, and would come "
            "across what is grown there",
            hint="name the modules inside, or let its forward call them by name",
        )


def _walks_over_children(cls: type[nn.Module]) -> str | None:
    """The attribute by which a class's forward reads all its children, if it does. torch's own forwards only ask
    them for hooks."""
    code = getattr(cls.forward, "__code__", None)
    if code is None or not code.co_varnames or cls.forward.__module__.startswith("torch."):
        return None
    steps = [(step.opname, step.argval) for step in dis.get_instructions(code) if step.opname.startswith("LOAD_")]
    own = code.co_varnames[0]
    return next((name for (_, of), (_, name) in itertools.pairwise(steps) if of == own and name in _WALKS), None)


def _patterns(targets: Iterable[Target]) -> Sequence[Target]:
    patterns = [targets] if isinstance(targets, str | type) else list(targets)
    for pattern in patterns:
        if not isinstance(pattern, str) and not (isinstance(pattern, type) and issubclass(pattern, nn.Module)):
            raise SiteError("ESP-314", f"target {pattern!r} is neither a layer class nor a glob on layer names")
    return patterns


def _matches(pattern: Target, name: str, module: nn.Module) -> bool:
    if isinstance(pattern, str):
        return fnmatch.fnmatchcase(name, pattern)
    return isinstance(module, pattern)


def _refuse_pattern(
    pattern: Target,
    matched: Mapping[str, nn.Module],
    modules: Mapping[str, nn.Module],
    layers: Mapping[str, nn.Module],
) -> None:
    shown = f"'{pattern}'" if isinstance(pattern, str) else pattern.__name__
    if matched:
        kinds = ", ".join(sorted({type(module).__name__ for module in matched.values()}))
        raise SiteError(
            "ESP-314",
            f"target {shown} matches only what is not supported: {kinds} has no forward of its own",
            hint=f"supported: {_supported()}; candidates: {listed(layers)}",
        )
    hint = near_names(pattern, modules) if isinstance(pattern, str) else f"candidates: {listed(layers)}"
    kinds = ", ".join(sorted({type(module).__name__ for module in modules.values()}))
    raise SiteError("ESP-314", f"target {shown} matches no layer; the model has: {kinds}", hint=hint)


def _supported() -> str:
    return ", ".join(kind.title for kind in HOST_KINDS)
