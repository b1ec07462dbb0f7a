"""Wrapping a model in place so that it can grow, and looking at what has grown.

Every change plans first, then checks, then mutates; a refusal leaves the model as it was.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
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
from esper.runtime.kasmina.wrapping.hosts import host_kind
from esper.runtime.kasmina.wrapping.hosts import layer_kind
from esper.runtime.kasmina.wrapping.morphable import STATE
from esper.runtime.kasmina.wrapping.morphable import M
from esper.runtime.kasmina.wrapping.morphable import ModelState
from esper.runtime.kasmina.wrapping.morphable import MorphableModel
from esper.runtime.kasmina.wrapping.morphable import strip
from esper.runtime.kasmina.wrapping.swap import mixed_class
from esper.runtime.kasmina.wrapping.swap import own_class
from esper.runtime.kasmina.wrapping.swap import swap
from esper.runtime.kasmina.wrapping.swap import swap_back
from esper.runtime.kasmina.wrapping.targets import PlannedSites
from esper.runtime.kasmina.wrapping.targets import Target
from esper.runtime.kasmina.wrapping.targets import planned_sites

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

    `target_layers` is `"auto"` (every supported layer whose forward is called) or classes and globs on dotted names,
    among which `"auto"` may stand too;
    a block (any module whose output has the shape of one of its inputs) is a site where it is named so, by its class,
    its name or a glob that matches no supported layer. `example_inputs` (a tensor, a tuple of positional or a mapping
    of keyword arguments) proves by one forward which of them are called, else the first forward does. No random number
    is drawn and every parameter stays the object it is. `cache_size_mb` limits the one kernel cache of the process.

    Raises SiteError ESP-314 (what cannot be wrapped, by name), ConfigurationError ESP-204 (a number out of range).
    """
    _check_number("seeds_per_layer", seeds_per_layer, MAX_SEEDS)
    _check_number("cache_size_mb", cache_size_mb, 65536)
    _check_model(model)
    plan = planned_sites(model, target_layers, exclude)
    sites = plan.sites
    mixed_class(own_class(model), MorphableModel, None)
    for module in sites.values():
        mixed_class(own_class(module), KasminaLayer, layer_forward)
    for name, module in sites.items():
        kind = host_kind(module)
        assert kind is not None
        module.__dict__["_kasmina"] = new_state(name, module, kind, seeds_per_layer)
        swap(module, KasminaLayer, layer_forward)
    model.__dict__[STATE] = ModelState(seeds_per_layer)
    swap(model, MorphableModel, None)
    if example_inputs is not None:
        try:
            _prove(model, example_inputs, plan)
        except BaseException:
            strip(model)
            raise
    kernel_cache().set_limit(cache_size_mb * 2**20)
    return model


def _prove(model: nn.Module, example_inputs: Any, plan: PlannedSites) -> None:
    """One forward and its lineage: which layers are called, and where data flows between them."""
    layer_graph(model, lambda: run_with(model, example_inputs))
    sites = plan.sites
    missed = [name for name, module in sites.items() if not state_of(module).proven]
    named = next((name for name in missed if name in plan.named), None)
    if named is not None:
        obstacle = state_of(sites[named]).obstacle
        raise SiteError(
            "ESP-314",
            f"'{named}' cannot be a site: {obstacle or 'its forward was not called with the example inputs'}",
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
    if layer_kind(model) is not None:
        raise SiteError(
            "ESP-314", f"this model is one {type(model).__name__}", hint="put it into torch.nn.Sequential(...)"
        )
