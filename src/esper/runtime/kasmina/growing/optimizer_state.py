"""What an optimizer keeps of two parameters that become one: the state of the longer one, or a refusal.

When a `widen` is folded, its weights are appended to the host's, and so must be what the optimizer knows of them. The
two parts differ in age and, where the block had an alpha, in scale. The principle of every rule here: the younger
part gets the state that a parameter of the host's age would have with the same estimate of its gradients.

- An exponential mean m that started at zero t steps ago is 1 - beta^t of its estimate (Kingma and Ba, Adam, section
  3), and the optimizer divides by the host's 1 - beta^t_old from now on: the younger part is multiplied by
  (1 - beta^t_old) / (1 - beta^t_new). The same for NAdam, RAdam and Adamax, which keep the same means, and for the
  running maximum of AMSGrad, which is a maximum of uncorrected means.
- A weight scaled by s has gradients scaled by 1 / s: a mean of gradients goes with s^-1, of squares with s^-2, what
  is counted in units of the weight itself with s^1.
- Adafactor keeps the means of squared gradients over rows and over columns: one of them is appended, of the other the
  mean over both parts is taken (Shazeer and Stern, Adafactor, algorithm 4).
- Step counts, and learning rates that decay by them, are the host's.
- A part that has never taken a step (a bias that the host did not have) gets the mean of squares of the other part on
  average: zero beside a step count would make its first updates several times the learning rate.
"""

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import ASGD
from torch.optim import SGD
from torch.optim import Adadelta
from torch.optim import Adafactor
from torch.optim import Adagrad
from torch.optim import Adam
from torch.optim import Adamax
from torch.optim import Muon
from torch.optim import NAdam
from torch.optim import Optimizer
from torch.optim import RAdam
from torch.optim import RMSprop
from torch.optim import Rprop

Group = Mapping[str, Any]


class StateRefused(Exception):
    """The state that an optimizer keeps of two parameters cannot be joined into that of one."""


def _zeros(group: Group, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter)


@dataclass(frozen=True)
class Moment:
    """One tensor of an optimizer's state.

    `power` is the exponent with which it follows the scale of the weight; `beta` the index in the group's `betas` of
    the mean's decay where the optimizer corrects its bias by the step count; `fresh(group, parameter)` what a
    parameter has that has not taken a step, None for the average of the other part; `mean_over` the dimension over
    which it is a mean, None where it has one value for each weight.
    """

    power: int
    beta: int | None = None
    fresh: Callable[[Group, Tensor], Tensor] | None = _zeros
    mean_over: int | None = None


_ADAM = {
    "exp_avg": Moment(-1, beta=0),
    "exp_avg_sq": Moment(-2, beta=1, fresh=None),
    "max_exp_avg_sq": Moment(-2, beta=1, fresh=None),
}
_BY_CLASS: tuple[tuple[type[Optimizer], Mapping[str, Moment]], ...] = (
    (SGD, {"momentum_buffer": Moment(-1)}),
    (Adam, _ADAM),
    (NAdam, _ADAM),
    (RAdam, _ADAM),
    (Adamax, {"exp_avg": Moment(-1, beta=0), "exp_inf": Moment(-1)}),
    # The buffer is a sum of gradients over their own root mean square: it has no unit.
    (RMSprop, {"square_avg": Moment(-2), "grad_avg": Moment(-1), "momentum_buffer": Moment(0)}),
    (
        Adagrad,
        {"sum": Moment(-2, fresh=lambda group, p: torch.full_like(p, group.get("initial_accumulator_value", 0.0)))},
    ),
    (Adadelta, {"square_avg": Moment(-2), "acc_delta": Moment(2)}),
    (ASGD, {"ax": Moment(1, fresh=lambda group, p: p.detach().clone())}),
    (
        Rprop,
        {"prev": Moment(-1), "step_size": Moment(1, fresh=lambda group, p: torch.full_like(p, float(group["lr"])))},
    ),
    (Muon, {"momentum_buffer": Moment(-1)}),
    (
        Adafactor,
        {
            "variance": Moment(-2, fresh=None),
            "row_var": Moment(-2, fresh=None, mean_over=-1),
            "col_var": Moment(-2, fresh=None, mean_over=-2),
        },
    ),
)

_BY_NAME: Mapping[str, Moment] = _ADAM | {"momentum_buffer": Moment(-1)}
"""For optimizers that others wrote: what these names mean everywhere. Any other tensor of the weight's shape is
appended as it is, if the two step counts are equal and the weight is not scaled."""


def joined_state(
    optimizer: Optimizer, group: Group, host: Tensor, grown: Tensor, dim: int, scale: float
) -> dict[str, Any] | None:
    """The state of a parameter that is `host` with `scale * grown` appended along `dim`.

    `group` is the host's parameter group. None where the optimizer keeps nothing of either. Raises StateRefused where
    it cannot be done right: state that is not by element, or whose meaning is not known.
    """
    old, new = optimizer.state.get(host, {}), optimizer.state.get(grown, {})
    if not old and not new:
        return None
    rules = next((rules for kind, rules in _BY_CLASS if isinstance(optimizer, kind)), None)
    joined: dict[str, Any] = {}
    for key in {**old, **new}:
        if _is_number(old.get(key)) and _is_number(new.get(key)):
            joined[key] = _number(key, old, new, known=rules is not None)
            continue
        moment = (_BY_NAME if rules is None else rules).get(key)
        if moment is None:
            moment = _unknown(optimizer, key, old, new, scale)
        mine, theirs = _value(key, moment, group, old, host), _value(key, moment, group, new, grown)
        if theirs is not None:
            theirs = theirs * (_correction(moment, group, old, new) * _power(moment, scale))
        mine, theirs = _or_average(moment, mine, host, theirs), _or_average(moment, theirs, grown, mine)
        theirs = theirs.to(mine.dtype)
        if moment.mean_over is not None and dim == moment.mean_over % host.dim():
            share = grown.shape[dim] / (host.shape[dim] + grown.shape[dim])
            joined[key] = torch.lerp(mine, theirs, share)
        else:
            joined[key] = torch.cat([mine, theirs], dim=dim)
    return joined


def _value(key: str, moment: Moment, group: Group, state: Mapping[str, Any], parameter: Tensor) -> Tensor | None:
    value = state.get(key)
    if value is None:
        return None if moment.fresh is None else moment.fresh(group, parameter)
    if not isinstance(value, Tensor) or list(value.shape) != _shape(moment, parameter):
        raise StateRefused(f"the optimizer's '{key}' is not kept by element")
    return value


def _or_average(moment: Moment, value: Tensor | None, parameter: Tensor, other: Tensor | None) -> Tensor:
    if value is not None:
        return value
    assert other is not None
    return other.mean().expand(_shape(moment, parameter))


def _shape(moment: Moment, parameter: Tensor) -> list[int]:
    shape = list(parameter.shape)
    if moment.mean_over is not None:
        shape[moment.mean_over] = 1
    return shape


def _unknown(optimizer: Optimizer, key: str, old: Mapping[str, Any], new: Mapping[str, Any], scale: float) -> Moment:
    """The rule for a tensor that only its own optimizer knows the meaning of: append it where age and scale agree."""
    mine, theirs = old.get("step"), new.get("step")
    same_age = mine is theirs or (mine is not None and theirs is not None and float(mine) == float(theirs))
    if not same_age or scale != 1.0:
        why = "scale" if same_age else "age"
        raise StateRefused(f"what '{key}' of {type(optimizer).__name__} means for parts of another {why} is not known")
    return Moment(0)


def _number(key: str, old: Mapping[str, Any], new: Mapping[str, Any], *, known: bool) -> Any:
    mine, theirs = old.get(key), new.get(key)
    if mine is None:
        return theirs
    if not known and key != "step" and theirs is not None and float(mine) != float(theirs):
        raise StateRefused(
            f"the optimizer's '{key}' is {float(mine):g} for one part and {float(theirs):g} for the other"
        )
    return mine


def _correction(moment: Moment, group: Group, old: Mapping[str, Any], new: Mapping[str, Any]) -> float:
    if moment.beta is None or "betas" not in group or "step" not in old or "step" not in new:
        return 1.0
    beta = float(group["betas"][moment.beta])
    younger = 1.0 - beta ** float(new["step"])
    return (1.0 - beta ** float(old["step"])) / younger if younger else 1.0


def _power(moment: Moment, scale: float) -> float:
    # A block at alpha 0 had no gradients: there is nothing to scale.
    return 1.0 if scale == 0.0 else float(scale**moment.power)


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0)
