"""An optimizer's state by parameter name: numbers by position would belong to other parameters after a graft."""

from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue
from torch import Tensor
from torch import nn
from torch.optim import Optimizer

from esper.contracts.base import Contract
from esper.errors import IntegrityError
from esper.errors import TargetError

_SEPARATOR = "\n"


class GroupRecord(Contract):
    """One parameter group: its parameters by name, in order, and its settings as plain JSON."""

    names: tuple[str, ...]
    settings: dict[str, JsonValue]
    tuples: tuple[str, ...] = ()
    """Settings that are tuples, which JSON has as lists."""


@dataclass(frozen=True)
class OptimizerState:
    """`tensors` maps `<state key>\\n<parameter name>` to private copies on the CPU; `scalars` the same for the rest."""

    kind: str
    groups: tuple[GroupRecord, ...]
    tensors: dict[str, Tensor]
    scalars: dict[str, JsonValue]


def capture_optimizer(optimizer: Optimizer, model: nn.Module) -> OptimizerState:
    """A private copy. Raises `TargetError` (ESP-312) for state that cannot be kept without pickle."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, JsonValue] = {}
    groups: list[GroupRecord] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                place = f"{key}{_SEPARATOR}{names[id(parameter)]}"
                if isinstance(value, Tensor):
                    tensors[place] = value.detach().clone().cpu()
                else:
                    scalars[place] = _scalar(optimizer, key, value)
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        groups.append(
            GroupRecord(
                names=tuple(names[id(parameter)] for parameter in group["params"]),
                settings={key: _scalar(optimizer, key, value) for key, value in settings.items()},
                tuples=tuple(key for key, value in settings.items() if isinstance(value, tuple)),
            )
        )
    return OptimizerState(type(optimizer).__name__, tuple(groups), tensors, scalars)


def restore_optimizer(optimizer: Optimizer, model: nn.Module, state: OptimizerState) -> None:
    """Give a new optimizer the groups and the state of a captured one, down to the bit.

    The model must have the parameters that the state names. Raises `IntegrityError` (ESP-409) if it has not.
    """
    parameters = dict(model.named_parameters())
    wanted = {name for group in state.groups for name in group.names}
    if type(optimizer).__name__ != state.kind:
        raise _other(f"its optimizer is {state.kind}, the run's is {type(optimizer).__name__}")
    if not wanted <= parameters.keys():
        raise _other(f"its optimizer knows {sorted(wanted - parameters.keys())[0]!r}, which the model does not have")
    template = optimizer.param_groups[0]
    optimizer.param_groups[len(state.groups) :] = []
    while len(optimizer.param_groups) < len(state.groups):
        optimizer.param_groups.append(dict(template))
    optimizer.state.clear()
    for group, record in zip(optimizer.param_groups, state.groups, strict=True):
        group["params"] = [parameters[name] for name in record.names]
        if "param_names" in group:
            group["param_names"] = list(record.names)
        for key, setting in record.settings.items():
            group[key] = tuple(setting) if key in record.tuples and isinstance(setting, list) else setting
        for name in record.names:
            parameter_state = _parameter_state(state, name, parameters[name], group)
            if parameter_state:
                optimizer.state[parameters[name]] = parameter_state


def _parameter_state(
    state: OptimizerState, name: str, parameter: nn.Parameter, group: dict[str, Any]
) -> dict[str, Any]:
    suffix = f"{_SEPARATOR}{name}"
    values: dict[str, Any] = {
        place.removesuffix(suffix): scalar for place, scalar in state.scalars.items() if place.endswith(suffix)
    }
    for place, tensor in state.tensors.items():
        if place.endswith(suffix):
            key = place.removesuffix(suffix)
            # Step counters stay on the CPU unless the kernel that reads them runs on the device.
            on_host = key == "step" and not (group.get("capturable") or group.get("fused"))
            values[key] = tensor.clone() if on_host else tensor.to(parameter.device, copy=True)
    return values


def _scalar(optimizer: Optimizer, key: str, value: object) -> JsonValue:
    if isinstance(value, Tensor) and value.dim() == 0:
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [_scalar(optimizer, key, item) for item in value]
    raise TargetError(
        "ESP-312",
        f"optimizer {type(optimizer).__name__} keeps {key!r} as a {type(value).__name__}, which no checkpoint can hold",
        hint="Use an optimizer whose state is tensors and plain numbers",
    )


def _other(why: str) -> IntegrityError:
    return IntegrityError(
        "ESP-409", f"the checkpoint is of another architecture: {why}", hint="Resume with the task it was made with"
    )
