"""Taking a model and what trains it back to an earlier moment, to the bit: growth, and all training since.

`cull` takes a block out and leaves the host as it has been trained beside it; `rollback` also undoes that training.
Everything goes back in place: parameters, state and lists stay the objects that others hold.
"""

import copy
from collections.abc import Callable
from collections.abc import Iterable
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.optim import Optimizer

from esper.errors import GrowthError
from esper.runtime.kasmina.growing.optimizer import several
from esper.runtime.kasmina.layer import KasminaLayer
from esper.runtime.kasmina.layer import SiteState
from esper.runtime.kasmina.replicas import refuse_replicated
from esper.runtime.kasmina.wrapping.morphable import STATE
from esper.runtime.kasmina.wrapping.morphable import ModelState
from esper.runtime.kasmina.wrapping.morphable import MorphableModel
from esper.runtime.kasmina.wrapping.morphable import model_state
from esper.runtime.kasmina.wrapping.morphable import settle
from esper.runtime.kasmina.wrapping.undisturbed import captured_random_state

Restore = Callable[[], None]

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_PLAIN = (bool, int, float, str, bytes, tuple, torch.Size, torch.dtype, type(None))

_NOT_OF_SITE = ("slots", "suspended", "recorder", "idle")
_NOT_OF_MODEL = ("suspended", "fused", "guards", "generation")
"""What belongs to a context manager that is open now, or follows from the rest."""


@dataclass(frozen=True)
class Snapshot:
    """A moment to which `rollback` goes back, as often as wanted. Holds private copies; nothing is written anywhere.

    `nbytes` is their size: parameters, buffers, pending gradients and the optimizers' state, on the devices where
    these are. With AdamW about three times the model; `zero_grad()` before saves a fourth.
    """

    nbytes: int
    _model: nn.Module = field(repr=False)
    _sites: tuple[nn.Module, ...] = field(repr=False)
    _parameters: tuple[nn.Parameter, ...] = field(repr=False)
    _restores: tuple[Restore, ...] = field(repr=False)


class _Memory:
    """Private copies of tensors, each made once, and how they go back."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._known: set[int] = set()
        self.restores: list[Restore] = []

    def copy(self, tensor: Tensor) -> Tensor:
        self.nbytes += tensor.numel() * tensor.element_size()
        return tensor.detach().clone()

    def tensor(self, tensor: Tensor) -> None:
        """Remember the content of a tensor that stays the object it is, with its gradient."""
        if id(tensor) in self._known:
            return
        self._known.add(id(tensor))
        content, trained = self.copy(tensor), tensor.requires_grad
        grad = tensor.grad if tensor.is_leaf else None
        gradient = None if grad is None else self.copy(grad)

        def restore() -> None:
            _write(tensor, content)
            if tensor.is_leaf:
                tensor.requires_grad_(trained)
                tensor.grad = None if gradient is None else gradient.clone()

        self.restores.append(restore)


def snapshot(model: nn.Module, *others: Any) -> Snapshot:
    """Remember a wrapped model and what trains it, for `rollback`.

    `others`: optimizers (or sequences of them), modules (an `AveragedModel`), `torch.Generator` objects, and
    anything with `state_dict` and `load_state_dict` (learning-rate schedulers, `GradScaler`). The global random
    generators are always part of it. What is not named here goes on as it is. Draws no random number. Raises
    SiteError ESP-314 (a model that is not wrapped), GrowthError ESP-437 (something that cannot be taken back).
    """
    model_state(model)
    memory = _Memory()
    _remember_module(model, memory)
    # Schedulers write to the optimizers' groups when they are loaded: these come after them.
    flat = list(_flat(others))
    for other in sorted(flat, key=lambda other: isinstance(other, Optimizer)):
        _remember_other(other, memory)
    memory.restores.append(captured_random_state())
    sites = tuple(module for module in model.modules() if isinstance(module, KasminaLayer))
    return Snapshot(memory.nbytes, model, sites, tuple(model.parameters()), tuple(memory.restores))


def rollback(snapshot: Snapshot) -> None:
    """Take everything that was given to `snapshot` back to that moment, to the bit.

    Blocks grafted since are gone, culled ones are back, folded ones are blocks again; `generation` rises, because the
    structure changed. Raises GrowthError ESP-437 (no snapshot, or the model was unwrapped since), ESP-440 when it has
    grown since and is inside DistributedDataParallel.
    """
    if not isinstance(snapshot, Snapshot):
        raise GrowthError("ESP-437", f"a {type(snapshot).__name__} is no snapshot", hint="esper.snapshot makes one")
    model = snapshot._model
    lost = not isinstance(model, MorphableModel) or not all(isinstance(m, KasminaLayer) for m in snapshot._sites)
    if lost:
        raise GrowthError("ESP-437", "the model was unwrapped since the snapshot: what was grown is plain PyTorch now")
    if [id(p) for p in model.parameters()] != [id(p) for p in snapshot._parameters]:
        refuse_replicated(model, "roll back growth")
    for restore in snapshot._restores:
        restore()
    model_state(model).generation += 1


def _flat(others: Iterable[Any]) -> Iterable[Any]:
    for other in others:
        if isinstance(other, list | tuple):
            yield from _flat(other)
        else:
            yield other


def _remember_other(other: Any, memory: _Memory) -> None:
    if isinstance(other, Optimizer):
        _remember_optimizer(other, memory)
    elif isinstance(other, nn.Module):
        _remember_module(other, memory)
    elif isinstance(other, torch.Generator):
        state = other.get_state()
        memory.restores.append(lambda: _set_generator(other, state))
    elif callable(getattr(other, "state_dict", None)) and callable(getattr(other, "load_state_dict", None)):
        saved = copy.deepcopy(other.state_dict())
        memory.restores.append(lambda: other.load_state_dict(copy.deepcopy(saved)))
    else:
        raise GrowthError(
            "ESP-437",
            f"a {type(other).__name__} cannot be taken back",
            hint="give optimizers, modules, torch.Generator, or what has state_dict and load_state_dict",
        )


def _set_generator(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def _remember_module(root: nn.Module, memory: _Memory) -> None:
    for module in root.modules():
        memory.restores.append(_remembered_structure(module))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                memory.tensor(tensor)
    wrapped = [module for module in root.modules() if isinstance(module.__dict__.get(STATE), ModelState)]
    for model in wrapped:
        memory.restores.append(_remembered_growth(model))


def _remembered_structure(module: nn.Module) -> Restore:
    """Which parameters, buffers and modules it has, and its plain attributes (`out_features`, `training`, counters)."""
    registries = {name: dict(module.__dict__[name]) for name in _REGISTRIES}
    unsaved = set(module._non_persistent_buffers_set)
    plain = _plain(module.__dict__)

    def restore() -> None:
        for name, entries in registries.items():
            # In place: torch.compile and others hold the registries themselves.
            module.__dict__[name].clear()
            module.__dict__[name].update(entries)
        module._non_persistent_buffers_set.clear()
        module._non_persistent_buffers_set.update(unsaved)
        module.__dict__.update(plain)

    return restore


def _remembered_growth(model: nn.Module) -> Restore:
    state = model_state(model)
    known = {name: value for name, value in vars(state).items() if name not in _NOT_OF_MODEL}
    sites = [_remembered_site(m.__dict__["_kasmina"]) for m in model.modules() if isinstance(m, KasminaLayer)]

    def restore() -> None:
        vars(state).update(known)
        for each in sites:
            each()
        settle(model)

    return restore


def _remembered_site(site: SiteState) -> Restore:
    known = {name: value for name, value in vars(site).items() if name not in _NOT_OF_SITE}
    slots = [(slot, dict(vars(slot))) for slot in site.slots]

    def restore() -> None:
        vars(site).update(known)
        site.slots[:] = [slot for slot, _ in slots]
        for slot, entries in slots:
            vars(slot).update(entries)

    return restore


def _remember_optimizer(optimizer: Optimizer, memory: _Memory) -> None:
    several(optimizer)
    groups = [(group, _held(group, memory)) for group in optimizer.param_groups]
    states = {parameter: _held(entries, memory) for parameter, entries in optimizer.state.items()}
    plain = _plain(vars(optimizer))

    def restore() -> None:
        optimizer.param_groups[:] = [group for group, _ in groups]
        for group, write in groups:
            write(group)
        for parameter in [parameter for parameter in optimizer.state if parameter not in states]:
            del optimizer.state[parameter]
        for parameter, write in states.items():
            write(optimizer.state[parameter])
        vars(optimizer).update(plain)

    memory.restores.append(restore)


def _held(entries: dict[str, Any], memory: _Memory) -> Callable[[dict[str, Any]], None]:
    """What makes a dictionary what it is now. Lists of parameters stay the lists they are."""
    lists = {key: (entries[key], list(entries[key])) for key in ("params", "param_names") if key in entries}
    tensors = {key: memory.copy(value) for key, value in entries.items() if isinstance(value, Tensor)}
    rest = {key: value for key, value in entries.items() if key not in lists and key not in tensors}
    rest = copy.deepcopy(rest)

    def write(target: dict[str, Any]) -> None:
        for key in [key for key in target if key not in entries_known]:
            del target[key]
        for key, (held, members) in lists.items():
            held[:] = members
            target[key] = held
        for key, content in tensors.items():
            now = target.get(key)
            if isinstance(now, Tensor) and now.shape == content.shape and now.dtype == content.dtype:
                _write(now, content)
            else:
                target[key] = content.clone()
        target.update(copy.deepcopy(rest))

    entries_known = {*lists, *tensors, *rest}
    return write


def _write(tensor: Tensor, content: Tensor) -> None:
    with torch.no_grad():
        if tensor.shape == content.shape and tensor.dtype == content.dtype:
            tensor.copy_(content)
        else:
            tensor.data = content.clone()


def _plain(entries: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entries.items() if isinstance(value, _PLAIN)}
