"""Small models of every shape that growth must live with."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch import nn


class Mlp(nn.Module):
    def __init__(self, inputs: int = 6, hidden: int = 5, outputs: int = 3, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4 * 4 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv1(x)).relu_()
        x = self.drop(torch.relu(self.conv2(x)))
        return self.head(x.flatten(1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))
        self.fc2 = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (Mlp, (8, 6)),
    "cnn": (Cnn, (8, 2, 8, 8)),
    "tied": (Tied, (8, 6)),
    "normed": (Normed, (8, 6)),
}


@dataclass(frozen=True)
class Zoo:
    """The models, by class and by name."""

    mlp: type[Mlp] = Mlp
    cnn: type[Cnn] = Cnn
    names: tuple[str, ...] = tuple(MODELS)

    def make(self, name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
        """A model with seeded weights and a batch for it; equal arguments give equal bits."""
        torch.manual_seed(seed)
        factory, shape = MODELS[name]
        model = factory()
        return model, torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))


@pytest.fixture
def zoo() -> Zoo:
    return Zoo()


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)
