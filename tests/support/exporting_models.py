"""Models for the tests of export: each wrapped, with blocks in it that compute something."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.nn import functional

import esper


@dataclass(frozen=True)
class Grown:
    """A wrapped and grown model in training mode, with inputs for it."""

    model: nn.Module
    inputs: Any


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 5)
        self.fc2 = nn.Linear(5, 5)
        self.fc3 = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


class Cnn(nn.Module):
    """BatchNorm statistics, an operation in place, dropout as a module and as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.conv = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2, padding_mode="circular")
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.conv(self.body(x)).relu_())
        return self.head(functional.dropout(x.flatten(1), 0.2, self.training))


class Odd(nn.Module):
    """Dictionaries in and out, a tied weight, a shared layer, a buffer no state dict has, a plain tensor, a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.tensor([2.0, 3.0, 4.0, 5.0])
        self.first = nn.Linear(4, 4)
        self.parts = nn.ModuleDict({"left": nn.Linear(4, 4), "2nd": nn.Tanh()})
        self.again = self.first
        self.gain = nn.ParameterList([nn.Parameter(torch.tensor([0.5]))])
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.first.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("steps", torch.arange(4.0), persistent=False)

    def forward(self, batch: dict[str, Any], negative: bool = False) -> dict[str, Any]:
        x = self.parts["2nd"](self.parts["left"](self.first(batch["x"]))) * self.gain[0]
        x = self.frozen(self.again(x)) * self.scale + self.steps - batch["rest"][0]
        if negative:
            x = -x
        x += 1
        return {"last": self.head(x), "more": (x.mean(), [x[:, -1:], x[..., ::2]])}


class Branching(nn.Module):
    """What symbolic tracing cannot follow: branches on shapes, on types, on an optional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if x.shape[0] > 1 and isinstance(x, Tensor):
            x = x * 3
        y = self.layer(functional.dropout(x, 0.1, self.training))
        return y if mask is None else y.masked_fill(mask, 0.0)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8, padding_idx=0)
        self.cells = nn.LSTM(8, 12, 2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(12, 20)

    def forward(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        y, state = self.cells(self.embed(ids), state)
        return self.head(y), state


def odd_inputs() -> dict[str, Any]:
    return {"batch": {"x": torch.randn(3, 4), "rest": (torch.randn(3, 1), [])}, "negative": True}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], tuple[tuple[str, str], ...]]] = {
    "mlp": (Mlp, lambda: torch.randn(8, 6), (("fc1", "bottleneck"), ("fc2", "widen"), ("fc3", "lowrank"))),
    "cnn": (Cnn, lambda: torch.randn(4, 2, 8, 8), (("body.0", "bottleneck"), ("head", "bottleneck"))),
    "odd": (Odd, odd_inputs, (("parts.left", "bottleneck"),)),
    "branching": (Branching, lambda: torch.randn(3, 4), (("layer", "bottleneck"),)),
    "recurrent": (Recurrent, lambda: torch.randint(0, 20, (3, 6)), (("head", "bottleneck"),)),
    "double": (
        lambda: nn.Sequential(Mlp(), nn.Tanh()).double(),
        lambda: torch.randn(8, 6).double(),
        (("0.fc1", "bottleneck"),),
    ),
    "normed": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 3)),
        lambda: torch.randn(8, 6),
        (("0", "bottleneck"),),
    ),
}


def make(name: str) -> Grown:
    """A grown model; its blocks have random weights instead of those that add nothing at birth."""
    factory, inputs, grafts = MODELS[name]
    model, given = factory(), inputs()
    esper.wrap(model, example_inputs=given)
    for site, blueprint in grafts:
        made = esper.graft(model, site, blueprint)
        for parameter in model.get_submodule(f"{site}.kasmina.{made.seed}").parameters():
            nn.init.normal_(parameter, std=0.2)
    return Grown(model, given)
