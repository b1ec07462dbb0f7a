"""Wrapping a model in place so that it can grow, and looking at what has grown.

Every change plans first, then checks, then mutates; a refusal leaves the model as it was.
"""

import fnmatch
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Literal

import torch
from torch import nn

from esper.errors import ConfigurationError
from esper.errors import SiteError
from esper.runtime.kasmina.cache import kernel_cache
from esper.runtime.kasmina.layer import KasminaLayer
from esper.runtime.kasmina.layer import layer_forward
from esper.runtime.kasmina.layer import new_state
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.lineage import layer_graph
from esper.runtime.kasmina.wrapping.hosts import HOST_KINDS
from esper.runtime.kasmina.wrapping.hosts import host_kind
from esper.runtime.kasmina.wrapping.hosts import is_uninitialised
from esper.runtime.kasmina.wrapping.morphable import STATE
from esper.runtime.kasmina.wrapping.morphable import M
from esper.runtime.kasmina.wrapping.morphable import ModelState
from esper.runtime.kasmina.wrapping.morphable import MorphableModel
from esper.runtime.kasmina.wrapping.morphable import listed
from esper.runtime.kasmina.wrapping.morphable import near_names
from esper.runtime.kasmina.wrapping.morphable import strip
from esper.runtime.kasmina.wrapping.swap import mixed_class
from esper.runtime.kasmina.wrapping.swap import own_class
from esper.runtime.kasmina.wrapping.swap import swap
from esper.runtime.kasmina.wrapping.swap import swap_back

Target = str | type[nn.Module]

MAX_SEEDS = 64
_WRAPPERS = ("OptimizedModule", "DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule")


def wrap(
    model: M,
    target_layers: Literal["auto"] | Iterable[Target] = "auto",
    *,
    example_inputs: Any = None,
    exclude: Iterable[Target] = (),
    seeds_per_layer: int = 4,
    cache_size_mb: int = 128,
) -> M:
    """Make a model growable, in place, and return it. Dormant it computes what it did, to the bit.

    `target_layers` is `"auto"` (every supported layer whose forward is called) or layer classes and globs on
    dotted names; `example_inputs` (a tensor, a tuple of positional or a mapping of keyword arguments) proves by one
    forward which layers those are, else the first forward does. No random number is drawn and every parameter
    stays the object it is. `cache_size_mb` limits the one kernel cache of the process.

    Raises SiteError ESP-314 (what cannot be wrapped, by name), ConfigurationError ESP-204 (a number out of range).
    """
    _check_number("seeds_per_layer", seeds_per_layer, MAX_SEEDS)
    _check_number("cache_size_mb", cache_size_mb, 65536)
    _check_model(model)
    explicit = target_layers != "auto"
    sites = _plan(model, target_layers, exclude)
    mixed_class(own_class(model), MorphableModel, None)
    for module in sites.values():
        mixed_class(own_class(module), KasminaLayer, layer_forward)
    for name, module in sites.items():
        kind = host_kind(module)
        assert kind is not None
        module.__dict__["_kasmina"] = new_state(name, kind.name, seeds_per_layer)
        swap(module, KasminaLayer, layer_forward)
    model.__dict__[STATE] = ModelState(seeds_per_layer)
    swap(model, MorphableModel, None)
    if example_inputs is not None:
        try:
            _prove(model, example_inputs, sites, explicit)
        except BaseException:
            strip(model)
            raise
    kernel_cache().set_limit(cache_size_mb * 2**20)
    return model


def _prove(model: nn.Module, example_inputs: Any, sites: Mapping[str, nn.Module], explicit: bool) -> None:
    """One forward and its lineage: which layers are called, and where data flows between them."""
    layer_graph(model, lambda: run_with(model, example_inputs))
    missed = [name for name, module in sites.items() if not state_of(module).proven]
    if missed and explicit:
        raise SiteError(
            "ESP-314",
            f"'{missed[0]}' cannot be a site: its forward was not called with the example inputs",
            hint="leave it out: what was grown there would never run",
        )
    if len(missed) == len(sites):
        raise SiteError("ESP-314", "no supported layer was called with the example inputs")
    for name in missed:
        del sites[name].__dict__["_kasmina"]
        swap_back(sites[name], KasminaLayer)


def run_with(model: Callable[..., Any], example_inputs: Any) -> Any:
    """Call a model on a tensor, a sequence of positional or a mapping of keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, tuple | list):
        return model(*example_inputs)
    return model(example_inputs)


def _check_number(name: str, value: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigurationError("ESP-204", f"{name} is {value!r}, must be a whole number from 1 to {most}")


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise SiteError("ESP-314", f"a {type(model).__name__} cannot be wrapped: it is no torch.nn.Module")
    for name, module in model.named_modules():
        where = f"'{name}'" if name else "this model"
        if isinstance(module, MorphableModel | KasminaLayer):
            raise SiteError("ESP-314", f"{where} is already wrapped", hint="call esper.unwrap(model) first")
        names = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("torch.")}
        wrapper = next((wrapper for wrapper in _WRAPPERS if wrapper in names), None)
        if wrapper is not None:
            raise SiteError(
                "ESP-314", f"{where} is inside {wrapper}", hint="wrap the model first, then put that around it"
            )
    if isinstance(model, torch.jit.ScriptModule):
        raise SiteError("ESP-314", "this model is scripted", hint="wrap the model that was scripted")
    if host_kind(model) is not None:
        raise SiteError(
            "ESP-314", f"this model is one {type(model).__name__}", hint="put it into torch.nn.Sequential(...)"
        )


def _plan(
    model: nn.Module, target_layers: Literal["auto"] | Iterable[Target], exclude: Iterable[Target]
) -> dict[str, nn.Module]:
    modules = {name: module for name, module in model.named_modules() if name}
    supported = {name: module for name, module in modules.items() if host_kind(module) is not None}
    attention = {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    excluded: set[str] = set()
    for pattern in _patterns(exclude):
        found = {name for name, module in modules.items() if _matches(pattern, name, module)}
        if not found and isinstance(pattern, str):
            # A slip here would let grow what must not; a class that this model lacks has nothing to leave out.
            hint = near_names(pattern, supported)
            raise SiteError("ESP-314", f"exclude '{pattern}' matches no layer", hint=hint)
        excluded |= found
    if target_layers == "auto":
        chosen = {
            name: module
            for name, module in supported.items()
            if id(module) not in attention and "forward" not in module.__dict__
        }
    else:
        chosen = {}
        for pattern in _patterns(target_layers):
            targets = {n: m for n, m in supported.items() if _matches(pattern, n, m)}
            if not targets:
                _refuse_pattern(pattern, modules, supported)
            chosen |= targets
        chosen = {name: supported[name] for name in supported if name in chosen}
    chosen = {name: module for name, module in chosen.items() if name not in excluded}
    if not chosen:
        kinds = sorted({type(module).__name__ for module in modules.values()})
        raise SiteError(
            "ESP-314",
            f"no supported layer is left to grow at in this {type(model).__name__}",
            hint=f"supported: {_supported()}; the model has: {', '.join(kinds) or 'no layers'}",
        )
    for name, module in chosen.items():
        if id(module) in attention or "forward" in module.__dict__:
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
    return chosen


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


def _refuse_pattern(pattern: Target, modules: Mapping[str, nn.Module], supported: Mapping[str, nn.Module]) -> None:
    shown = f"'{pattern}'" if isinstance(pattern, str) else pattern.__name__
    other = next((m for n, m in modules.items() if _matches(pattern, n, m)), None)
    if other is not None:
        raise SiteError(
            "ESP-314",
            f"target {shown} matches only layers that are not supported, such as {type(other).__name__}",
            hint=f"supported: {_supported()}; candidates: {listed(supported)}",
        )
    hint = near_names(pattern, supported) if isinstance(pattern, str) else f"candidates: {listed(supported)}"
    kinds = ", ".join(sorted({type(module).__name__ for module in modules.values()}))
    raise SiteError("ESP-314", f"target {shown} matches no layer; the model has: {kinds}", hint=hint)


def _supported() -> str:
    return ", ".join(kind.module_type.__name__ for kind in HOST_KINDS)
