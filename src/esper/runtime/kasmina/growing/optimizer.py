"""What growth does to an optimizer: newborn parameters join their host's group, removed ones leave without a trace.

The host's own group, because an added group makes LambdaLR, OneCycleLR and others raise and LinearLR overshoot. Old
parameters and their state are never touched.
"""

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import nn

from esper.errors import GrowthError

Named = Sequence[tuple[str, nn.Parameter]]


class StateRefused(Exception):
    """The state that an optimizer keeps of two parameters cannot be joined into that of one."""


@dataclass(frozen=True)
class Join:
    """Newborn parameters on their way into an optimizer. Everything has been checked: `apply` cannot fail."""

    optimizer: torch.optim.Optimizer
    group: dict[str, Any] | None
    own_group: dict[str, Any] | None
    named: tuple[tuple[str, nn.Parameter], ...]
    zero_momentum: bool

    def apply(self) -> None:
        if self.own_group is not None:
            self.optimizer.add_param_group(self.own_group)
            return
        assert self.group is not None
        for name, parameter in self.named:
            self.group["params"].append(parameter)
            if "param_names" in self.group:
                self.group["param_names"].append(name)
            if self.zero_momentum:
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def plan_join(optimizer: torch.optim.Optimizer, host: Named, newborn: Named) -> Join:
    """How `newborn` join the group in which `host` is. Names are those in the model.

    The host's group; without the host in any group (a frozen host) the only group; else, or where the group's
    settings cannot serve a newborn, a group of their own. Raises GrowthError ESP-433 where the optimizer cannot
    take them.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise GrowthError("ESP-433", f"a {type(optimizer).__name__} is no torch.optim.Optimizer")
    kinds = {cls.__name__ for cls in type(optimizer).__mro__}
    if "LBFGS" in kinds:
        raise GrowthError(
            "ESP-433",
            "LBFGS cannot take new parameters: it would accept and silently ignore them",
            hint="train with SGD, Adam, AdamW or another first-order optimizer",
        )
    if "Muon" in kinds:
        flat = [name for name, parameter in newborn if parameter.dim() != 2]
        if flat:
            raise GrowthError(
                "ESP-433",
                f"Muon takes only matrices, and {', '.join(flat)} is none",
                hint="graft without optimizer= and give the new parameters to a second optimizer, or use 'lowrank'",
            )
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    taken = [name for name, parameter in newborn if id(parameter) in known]
    if taken:
        raise GrowthError("ESP-433", f"the optimizer already has {', '.join(taken)}")
    group, prefix = _host_group(optimizer, host)
    named = tuple((prefix + name, parameter) for name, parameter in newborn)
    if group is None:
        named_groups = any("param_names" in existing for existing in optimizer.param_groups)
        return Join(optimizer, None, {"params": list(named) if named_groups else [p for _, p in named]}, named, False)
    if group.get("fused") and group.get("momentum"):
        # Fused SGD crashes where some of a group have a momentum buffer and some have none.
        started = any("momentum_buffer" in optimizer.state.get(p, {}) for p in group["params"])
        if started and group.get("dampening"):
            settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            members = list(named) if "param_names" in group else [p for _, p in named]
            return Join(optimizer, None, settings | {"params": members}, named, False)
        return Join(optimizer, group, None, named, started)
    return Join(optimizer, group, None, named, False)


def leave(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Take parameters and everything that is kept of them out of an optimizer; a group that this empties goes too."""
    gone = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        keep = [index for index, parameter in enumerate(group["params"]) if id(parameter) not in gone]
        if len(keep) == len(group["params"]):
            continue
        # In place: schedulers and users may hold the lists.
        if "param_names" in group:
            group["param_names"][:] = [group["param_names"][index] for index in keep]
        group["params"][:] = [group["params"][index] for index in keep]
        if not keep:
            optimizer.param_groups.remove(group)
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
        parameter.grad = None


def replace_parameter(
    optimizer: torch.optim.Optimizer, old: Tensor, new: nn.Parameter, state: dict[str, Any] | None
) -> None:
    """Put a parameter in the place of another, with a state of its own."""
    for group in optimizer.param_groups:
        group["params"][:] = [new if parameter is old else parameter for parameter in group["params"]]
    optimizer.state.pop(old, None)
    old.grad = None
    if state is not None:
        optimizer.state[new] = state


def joined_state(
    optimizer: torch.optim.Optimizer, host: Tensor, grown: Tensor, dim: int, scale: float
) -> dict[str, Any] | None:
    """The state of a parameter that is `host` with `scale * grown` appended along `dim`.

    Moments of the younger part are rescaled, so that the bias correction of the older part's step count is right
    for both: m by (1 - beta1^t_old) / (1 - beta1^t_new), v by the same with beta2. None where there is no state.
    Raises StateRefused for an optimizer whose state is not by element.
    """
    old, new = optimizer.state.get(host, {}), optimizer.state.get(grown, {})
    if not old and not new:
        return None
    group = next((g for g in optimizer.param_groups if any(p is host for p in g["params"])), {})
    joined: dict[str, Any] = {}
    for key in {**old, **new}:
        mine, theirs = old.get(key), new.get(key)
        if _is_by_element(mine, host) or _is_by_element(theirs, grown):
            mine = torch.zeros_like(host) if mine is None else mine
            theirs = torch.zeros_like(grown) if theirs is None else theirs
            if mine.shape != host.shape or theirs.shape != grown.shape:
                raise StateRefused(f"the optimizer's '{key}' is not kept by element")
            factor = _correction(key, group, old, new) * _power(key, scale)
            joined[key] = torch.cat([mine, (theirs * factor).to(mine.dtype)], dim=dim)
        elif _is_scalar(mine) and _is_scalar(theirs):
            joined[key] = theirs if mine is None else mine
        else:
            raise StateRefused(f"the optimizer's '{key}' is not kept by element")
    return joined


def _host_group(optimizer: torch.optim.Optimizer, host: Named) -> tuple[dict[str, Any] | None, str]:
    """The group that the host's parameters are in, and what the optimizer's names have before the model's."""
    for name, parameter in host:
        for group in optimizer.param_groups:
            for index, member in enumerate(group["params"]):
                if member is parameter:
                    known = str(group["param_names"][index]) if "param_names" in group else name
                    return group, known.removesuffix(name) if known.endswith(name) else ""
    return (optimizer.param_groups[0], "") if len(optimizer.param_groups) == 1 else (None, "")


def _is_by_element(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0)


_BETA_OF: dict[str, Callable[[dict[str, Any]], float]] = {
    "exp_avg": lambda group: float(group["betas"][0]),
    "exp_avg_sq": lambda group: float(group["betas"][1]),
    "max_exp_avg_sq": lambda group: float(group["betas"][1]),
}


def _correction(key: str, group: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> float:
    if key not in _BETA_OF or "betas" not in group or "step" not in old or "step" not in new:
        return 1.0
    beta = _BETA_OF[key](group)
    younger = 1.0 - beta ** float(new["step"])
    return (1.0 - beta ** float(old["step"])) / younger if younger else 1.0


def _power(key: str, scale: float) -> float:
    """A weight scaled by s has gradients scaled by 1/s: first moments go with 1/s, second ones with 1/s^2."""
    if scale in (0.0, 1.0):
        return 1.0
    return scale**-2 if key in ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum") else 1.0 / scale
