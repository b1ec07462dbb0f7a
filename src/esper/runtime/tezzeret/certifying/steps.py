"""Optimizer steps on a private copy: what they move, whom they reach, and whether all of it stays finite."""

import dataclasses
import inspect
import math
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import nn

from esper.contracts.config import OptimizerConfig

Parameters = Sequence[nn.Parameter]
Optimizers = tuple[torch.optim.Optimizer, ...]
Given = OptimizerConfig | torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None
"""A run's configuration, the optimizer itself or several that share the model; None is Esper's own default."""


@dataclass(frozen=True)
class Stepping:
    """How a kernel will be trained: `optimizers(parameters, factor)` makes new ones with `factor` times the learning
    rate, none for no parameters.

    `clip` is the largest total gradient norm, None for no clipping; `name` says which optimizer it is.
    """

    name: str
    optimizers: Callable[[Parameters, float], Optimizers]
    clip: float | None = None


@dataclass(frozen=True)
class Steps:
    """What optimizer steps did: the output after the first one, names of parameters that had a gradient, names of
    what was not finite, and the bytes that the optimizer keeps."""

    first: Tensor
    with_gradient: frozenset[str]
    not_finite: tuple[str, ...]
    state_bytes: int


def stepping_of(given: Given) -> Stepping:
    """From a configuration, or from optimizers: each made anew, as its first group is set. One that cannot be made
    anew, or that takes no plain step (LBFGS, SparseAdam, a constructor of another form), Esper's own stands in for,
    and the name says so."""
    if isinstance(given, OptimizerConfig) or given is None:
        return _configured(given if given is not None else OptimizerConfig())
    chosen = (given,) if isinstance(given, torch.optim.Optimizer) else tuple(given)
    name = " + ".join(type(one).__name__ for one in chosen)
    if not chosen or not all(_can_be_made(one) for one in chosen):
        own = _configured(OptimizerConfig())
        return dataclasses.replace(own, name=f"{own.name} in place of {name}")
    return Stepping(name, lambda parameters, factor: _alike(chosen, parameters, factor))


def _configured(config: OptimizerConfig) -> Stepping:
    def make(parameters: Parameters, factor: float) -> Optimizers:
        return (configured(config, parameters, factor),) if parameters else ()

    return Stepping(config.name, make, config.clip)


def configured(config: OptimizerConfig, parameters: Parameters, factor: float = 1.0) -> torch.optim.Optimizer:
    """The configured optimizer at its peak learning rate times `factor`; what is not configured is torch's default."""
    match config.name:
        case "sgd":
            return torch.optim.SGD(
                parameters, lr=config.lr * factor, momentum=config.momentum, weight_decay=config.weight_decay
            )
        case "adam":
            return torch.optim.Adam(parameters, lr=config.lr * factor, weight_decay=config.weight_decay)
        case "adamw":
            return torch.optim.AdamW(parameters, lr=config.lr * factor, weight_decay=config.weight_decay)


def take_steps(
    module: nn.Module, x: Tensor, g: Tensor, stepping: Stepping, *, count: int, factor: float = 1.0
) -> Steps:
    """Train `module` for `count` >= 1 steps on output gradient `g`, in training mode. A module without parameters
    only runs."""
    parameters = dict(module.named_parameters())
    optimizers = stepping.optimizers(list(parameters.values()), factor)
    module.train()
    with_gradient: set[str] = set()
    broken: set[str] = set()
    first: Tensor | None = None
    for _ in range(count):
        broken |= backward(module, x, g)
        for name, parameter in parameters.items():
            if parameter.grad is not None and bool(parameter.grad.any()):
                with_gradient.add(name)
        if stepping.clip is not None:
            nn.utils.clip_grad_norm_(parameters.values(), stepping.clip)
        for optimizer in optimizers:
            optimizer.step()
        module.zero_grad(set_to_none=True)
        output = module(x).detach()
        first = output if first is None else first
        broken |= {name for name, p in parameters.items() if not bool(p.detach().isfinite().all())}
        if not bool(output.isfinite().all()):
            broken.add("output")
    assert first is not None
    kept = sum(_bytes(state) for optimizer in optimizers for state in optimizer.state.values())
    return Steps(first, frozenset(with_gradient), tuple(sorted(broken)), kept)


def backward(module: nn.Module, x: Tensor, g: Tensor) -> set[str]:
    """One forward and backward; gradients are added to the parameters. Gives the names of what was not finite."""
    leaf = x.detach().requires_grad_(x.is_floating_point())
    output = module(leaf)
    broken = set() if bool(output.detach().isfinite().all()) else {"output"}
    if output.requires_grad:
        output.backward(g.to(output.dtype))
    gradients = {f"gradient of {name}": p.grad for name, p in module.named_parameters()} | {"gradient of x": leaf.grad}
    return broken | {name for name, grad in gradients.items() if grad is not None and not bool(grad.isfinite().all())}


def largest(tensor: Tensor) -> float:
    """The largest absolute value; infinite where a number is NaN or infinite."""
    if tensor.numel() == 0:
        return 0.0
    value = float(tensor.double().abs().max())
    return value if math.isfinite(value) else math.inf


def root_mean_square(tensor: Tensor) -> float:
    """Over all elements."""
    return math.sqrt(float(tensor.double().square().mean()))


def _accepts(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> bool:
    """Muon takes matrices only."""
    return parameter.dim() == 2 or all(cls.__name__ != "Muon" for cls in type(optimizer).__mro__)


def _alike(given: Sequence[torch.optim.Optimizer], parameters: Parameters, factor: float) -> Optimizers:
    """New optimizers of the same classes and settings, each with the parameters that go to it: to the first that
    accepts them. What none accepts AdamW trains at the same learning rate, as the partner that a user must give."""
    shares: list[list[nn.Parameter]] = [[] for _ in given]
    others: list[nn.Parameter] = []
    for parameter in parameters:
        home = next((share for one, share in zip(given, shares, strict=True) if _accepts(one, parameter)), others)
        home.append(parameter)
    made = [_twin(one, share, factor) for one, share in zip(given, shares, strict=True) if share]
    if others:
        made.append(torch.optim.AdamW(others, lr=float(given[0].param_groups[0]["lr"]) * factor))
    return tuple(made)


def _twin(given: torch.optim.Optimizer, parameters: Parameters, factor: float) -> torch.optim.Optimizer:
    """An optimizer of the class of `given`, set as its first group, that has seen nothing yet."""
    settings = {key: value for key, value in given.param_groups[0].items() if key not in ("params", "param_names")}
    settings["lr"] = float(settings["lr"]) * factor
    kind: Any = type(given)
    taken = inspect.signature(kind.__init__).parameters
    try:
        made: torch.optim.Optimizer = kind(list(parameters), **{k: v for k, v in settings.items() if k in taken})
    except TypeError:
        # A constructor of another form: the object as unpickling would make it, with nothing remembered.
        made = kind.__new__(kind)
        group = settings | {"params": list(parameters)}
        made.__setstate__({"defaults": dict(given.defaults), "state": defaultdict(dict), "param_groups": [group]})
    return made


def _can_be_made(given: torch.optim.Optimizer) -> bool:
    weight = nn.Parameter(torch.zeros((2, 2), device="cpu"))
    weight.grad = torch.ones_like(weight)
    try:
        _twin(given, [weight], 1.0).step()
    except Exception:  # a stranger's optimizer may raise anything
        return False
    return bool(weight.detach().any())


def _bytes(state: Mapping[str, Any]) -> int:
    return sum(value.nbytes for value in state.values() if isinstance(value, Tensor))
