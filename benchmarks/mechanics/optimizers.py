"""Every optimizer of torch with every switch that changes how it works, found by looking at `torch.optim`."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

SWITCHES: Mapping[str, Mapping[str, Any]] = {
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "amsgrad": {"amsgrad": True},
    "momentum": {"momentum": 0.9},
    "nesterov": {"nesterov": True, "momentum": 0.9},
    "centered": {"centered": True},
}
"""Settings that, where a constructor knows them, are a case of their own."""


@dataclass(frozen=True)
class OptimizerCase:
    """One class with one switch on, all else torch's default."""

    name: str
    kind: type[Optimizer]
    settings: tuple[tuple[str, Any], ...] = ()

    def make(self, model: nn.Module) -> tuple[Optimizer, ...]:
        """For all of a model: one, or for an optimizer that takes matrices only two, with AdamW as its partner."""
        parameters = list(model.parameters())
        if not any(cls.__name__ == "Muon" for cls in self.kind.__mro__):
            return (self.kind(parameters, **dict(self.settings)),)
        matrices = [p for p in parameters if p.dim() == 2]
        others = [p for p in parameters if p.dim() != 2]
        partner = (torch.optim.AdamW(others),) if others else ()
        return (self.kind(matrices, **dict(self.settings)), *partner) if matrices else partner

    @property
    def steps_alone(self) -> bool:
        """Whether `step()` works on dense gradients and asks for no closure."""
        closure = inspect.signature(self.kind.step).parameters.get("closure")
        return (closure is None or closure.default is None) and "Sparse" not in self.kind.__name__


def _cases() -> tuple[OptimizerCase, ...]:
    found = []
    for name in sorted(dir(torch.optim)):
        kind = getattr(torch.optim, name)
        if not isinstance(kind, type) or not issubclass(kind, Optimizer) or kind is Optimizer:
            continue
        known = inspect.signature(kind.__init__).parameters
        found.append(OptimizerCase(name, kind))
        found += [
            OptimizerCase(f"{name} {switch}", kind, tuple(settings.items()))
            for switch, settings in SWITCHES.items()
            if all(setting in known for setting in settings)
        ]
    return tuple(found)


OPTIMIZERS: tuple[OptimizerCase, ...] = _cases()
DEFAULT = next(case for case in OPTIMIZERS if case.name == "AdamW")
