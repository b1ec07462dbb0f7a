"""What growth does to optimizers: newborn parameters join their host's group, removed ones leave without a trace.

The host's own group, because an added group makes LambdaLR, OneCycleLR and others raise and LinearLR overshoot. Old
parameters and their state are never touched. What an optimizer must be like, whoever wrote it: it reads the parameters
of `param_groups` at each step and makes the state of one that it has not seen before, as all of torch.optim do but
for LBFGS. One that keeps lists of its own, or overrides `add_param_group` to be told, is refused by name.

Every function takes one optimizer or several: models are trained with Muon for matrices beside another for the rest.
"""

from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.optim import Optimizer

from esper.errors import GrowthError
from esper.runtime.kasmina.growing.optimizer_state import StateRefused
from esper.runtime.kasmina.growing.optimizer_state import joined_state as _joined_state

Optimizers = Optimizer | Sequence[Optimizer]
Named = Sequence[tuple[str, nn.Parameter]]

_MEMBERS = ("params", "param_names")
_SCHEDULED = "initial_lr"
"""What every learning-rate scheduler leaves in the groups that it has counted."""


@dataclass(frozen=True)
class Entry:
    """One parameter's place: at the end of `group`, or, where `apart`, in a new one with the same settings.

    Without a group in a new one with the optimizer's defaults.
    """

    optimizer: Optimizer
    group: dict[str, Any] | None
    name: str
    parameter: nn.Parameter
    apart: bool = False
    zero_momentum: bool = False


@dataclass(frozen=True)
class Join:
    """Newborn parameters on their way into optimizers. Everything has been checked: `apply` cannot fail."""

    entries: tuple[Entry, ...]

    def apply(self) -> None:
        made: dict[tuple[int, int], dict[str, Any]] = {}
        for entry in self.entries:
            group = entry.group
            if entry.apart:
                group = made.get((id(entry.optimizer), id(entry.group)))
            if group is None:
                settings = {key: value for key, value in (entry.group or {}).items() if key not in _MEMBERS}
                named = any("param_names" in existing for existing in entry.optimizer.param_groups)
                member = (entry.name, entry.parameter) if named else entry.parameter
                entry.optimizer.add_param_group(settings | {"params": [member]})
                made[id(entry.optimizer), id(entry.group)] = entry.optimizer.param_groups[-1]
                continue
            group["params"].append(entry.parameter)
            if "param_names" in group:
                group["param_names"].append(entry.name)
            if entry.zero_momentum:
                entry.optimizer.state[entry.parameter]["momentum_buffer"] = torch.zeros_like(entry.parameter)


def plan_join(optimizer: Optimizers, host: Named, newborn: Named) -> Join:
    """Where each of `newborn` goes. Names are those in the model; `host` are the parameters of the layer it grows at.

    A matrix (or more dimensions) joins the group of the host's first parameter of that kind, a vector that of the
    host's first vector: so decayed weights and biases without decay stay apart. Without one the group of any other
    parameter of the host; where that cannot take it (Muon takes matrices only) or the host is in no group (it is
    frozen) the only group that can; else a group of their own, with the optimizer's defaults. Raises GrowthError
    ESP-433 where they cannot be taken, or a group of their own would break a learning-rate scheduler.
    """
    optimizers = checked(optimizer)
    for each in optimizers:
        taken = [
            name for name, parameter in newborn if any(parameter is p for g in each.param_groups for p in g["params"])
        ]
        if taken:
            raise GrowthError("ESP-433", f"the optimizer already has {', '.join(taken)}")
    return Join(tuple(_entry(optimizers, host, name, parameter) for name, parameter in newborn))


def leave(optimizer: Optimizers, parameters: Sequence[nn.Parameter]) -> None:
    """Take parameters and everything that is kept of them out of the optimizers.

    A group that this empties goes too, unless a scheduler has counted it: an empty group costs nothing, one that is
    missing makes the scheduler raise.
    """
    gone = {id(parameter) for parameter in parameters}
    for each in several(optimizer):
        for group in list(each.param_groups):
            keep = [index for index, parameter in enumerate(group["params"]) if id(parameter) not in gone]
            if len(keep) == len(group["params"]):
                continue
            # In place: schedulers and users may hold the lists.
            if "param_names" in group:
                group["param_names"][:] = [group["param_names"][index] for index in keep]
            group["params"][:] = [group["params"][index] for index in keep]
            if not keep and _SCHEDULED not in group:
                each.param_groups[:] = [other for other in each.param_groups if other is not group]
        for parameter in parameters:
            each.state.pop(parameter, None)
    for parameter in parameters:
        parameter.grad = None


def replace_parameter(optimizer: Optimizers, old: Tensor, new: nn.Parameter, state: dict[str, Any] | None) -> None:
    """Put a parameter in the place of another, with a state of its own."""
    for each in several(optimizer):
        if _group_of(each, old) is None:
            continue
        for group in each.param_groups:
            group["params"][:] = [new if parameter is old else parameter for parameter in group["params"]]
        each.state.pop(old, None)
        if state is not None:
            each.state[new] = state
    old.grad = None


def joined_state(optimizer: Optimizers, host: Tensor, grown: Tensor, dim: int, scale: float) -> dict[str, Any] | None:
    """What the optimizer must know of `host` with `scale * grown` appended along `dim`; None where it knows nothing.

    The rules are those of `optimizer_state`. Raises StateRefused where the two cannot become one parameter: another
    optimizer trains the one than the other, the host is not trained, or the state cannot be joined.
    """
    homes = [(each, _group_of(each, host), _group_of(each, grown)) for each in several(optimizer)]
    trained = [(each, mine, theirs) for each, mine, theirs in homes if mine is not None or theirs is not None]
    if not trained:
        return None
    each, mine, theirs = trained[0]
    if len(trained) > 1:
        raise StateRefused("the host and the block are trained by two optimizers")
    if isinstance(host, nn.Parameter) and mine is None:
        raise StateRefused(
            "the optimizer trains the block and not the host: as a part of it the block would stand still"
        )
    group = mine if mine is not None else theirs
    assert group is not None
    return _joined_state(each, group, host, grown, dim, scale)


def checked(optimizer: Optimizers) -> tuple[Optimizer, ...]:
    """One optimizer or a sequence as a tuple. Raises GrowthError ESP-433 for what would not see that parameters were
    appended to its groups."""
    found = several(optimizer)
    for each in found:
        _check_known(each)
    return found


def several(optimizer: Optimizers) -> tuple[Optimizer, ...]:
    """One optimizer or a sequence as a tuple. Raises GrowthError ESP-433 for what is no torch optimizer."""
    found = tuple(optimizer) if isinstance(optimizer, list | tuple) else (optimizer,)
    for each in found:
        if not isinstance(each, Optimizer):
            raise GrowthError("ESP-433", f"a {type(each).__name__} is no torch.optim.Optimizer")
    if not found:
        raise GrowthError("ESP-433", "optimizer is an empty list", hint="leave it out to graft without one")
    return found


def _entry(optimizers: tuple[Optimizer, ...], host: Named, name: str, parameter: nn.Parameter) -> Entry:
    homes = list(_homes(optimizers, host))
    homes.sort(key=lambda home: (home[2].dim() < 2) != (parameter.dim() < 2))
    for optimizer, group, _, prefix in homes:
        if _obstacle(optimizer, group, parameter) is None:
            return _within(optimizer, group, prefix + name, parameter)
    open_groups = [(o, g) for o in optimizers for g in o.param_groups if _obstacle(o, g, parameter) is None]
    if len(open_groups) == 1:
        return _within(*open_groups[0], name, parameter)
    if not open_groups:
        why = next(_obstacle(o, g, parameter) for o in optimizers for g in o.param_groups)
        raise GrowthError(
            "ESP-433",
            f"no optimizer can take {name} of shape {tuple(parameter.shape)}: {why}",
            hint="give a second optimizer that can, as optimizer=[first, second]; or graft without optimizer= and "
            "train the new parameters with one of their own",
        )
    optimizer = open_groups[0][0]
    return _apart(optimizer, None, name, parameter, "its host's parameters are in none of the groups")


def _within(optimizer: Optimizer, group: dict[str, Any], name: str, parameter: nn.Parameter) -> Entry:
    if not (group.get("fused") and group.get("momentum")):
        return Entry(optimizer, group, name, parameter)
    # Fused SGD crashes where some of a group have a momentum buffer and some have none.
    started = any("momentum_buffer" in optimizer.state.get(p, {}) for p in group["params"])
    if started and group.get("dampening"):
        # The first gradient is not dampened, so that no buffer to begin with gives the same as none.
        return _apart(optimizer, group, name, parameter, "fused SGD with dampening cannot take it into a group")
    return Entry(optimizer, group, name, parameter, zero_momentum=started)


def _apart(optimizer: Optimizer, group: dict[str, Any] | None, name: str, parameter: nn.Parameter, why: str) -> Entry:
    if any(_SCHEDULED in group for group in optimizer.param_groups):
        raise GrowthError(
            "ESP-433",
            f"{name} would need a parameter group of its own, because {why}, and the learning-rate scheduler of "
            f"this {type(optimizer).__name__} does not count groups that come later",
            hint="put the host's parameters into a group (frozen ones get no updates), take fused=False, or make the "
            "scheduler after the graft",
        )
    return Entry(optimizer, group, name, parameter, apart=True)


def _homes(
    optimizers: tuple[Optimizer, ...], host: Named
) -> Iterator[tuple[Optimizer, dict[str, Any], nn.Parameter, str]]:
    """Where the host's parameters are, in their order, and what the optimizer's names have before the model's."""
    for name, parameter in host:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for index, member in enumerate(group["params"]):
                    if member is parameter:
                        known = str(group["param_names"][index]) if "param_names" in group else name
                        prefix = known.removesuffix(name) if known.endswith(name) else ""
                        yield optimizer, group, parameter, prefix


def _group_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any] | None:
    return next((g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), None)


def _obstacle(optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> str | None:
    """Why a parameter cannot be in a group; None where it can."""
    kinds = {cls.__name__ for cls in type(_inner(optimizer)).__mro__}
    if "LBFGS" in kinds:
        return "LBFGS would accept and silently ignore new parameters"
    if "SparseAdam" in kinds:
        return "SparseAdam takes sparse gradients only"
    if ("Muon" in kinds or group.get("use_muon")) and parameter.dim() != 2:
        return f"{type(optimizer).__name__} takes only matrices"
    return None


def _inner(optimizer: Optimizer) -> Optimizer:
    """The optimizer itself, behind wrappers that share its groups."""
    for value in vars(optimizer).values():
        if isinstance(value, Optimizer) and value is not optimizer and value.param_groups is optimizer.param_groups:
            return _inner(value)
    return optimizer


def _check_known(optimizer: Optimizer) -> None:
    """Refuse an optimizer that would not see parameters appended to its groups. Raises GrowthError ESP-433."""
    inner = _inner(optimizer)
    kind = type(inner).__name__
    if type(inner).__module__.startswith("torch.optim"):
        return
    if type(inner).add_param_group is not Optimizer.add_param_group:
        raise GrowthError(
            "ESP-433",
            f"{kind} overrides add_param_group: it would not learn of parameters that join an existing group",
            hint=f"graft without optimizer= and give {kind} the new parameters yourself",
        )
    own = {id(p) for group in inner.param_groups for p in group["params"]}
    for name, value in vars(inner).items():
        if name in ("param_groups", "state") or not isinstance(value, list | tuple | set | dict):
            continue
        if any(id(item) in own for item in (value.values() if isinstance(value, dict) else value)):
            raise GrowthError(
                "ESP-433",
                f"{kind} keeps a list of its parameters of its own ('{name}'): it would silently ignore new ones",
                hint="train with an optimizer that reads param_groups at each step",
            )
