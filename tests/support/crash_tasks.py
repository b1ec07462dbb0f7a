"""A task for crash tests: tiny, with something to grow, and with every kind of state that a resume must bring back."""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset
from torch.utils.data import TensorDataset

from esper.runtime.tolaria.tasks import Task

ROWS = 128


class Bottlenecked(nn.Module):
    """A layer of width one, so that what it lacks is known; dropout and a batch normalisation, so that generators and
    buffers count."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 1)
        self.second = nn.Linear(1, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.02)
        self.last = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(torch.relu(self.first(x)))
        return self.last(self.dropout(torch.relu(self.norm(x))))


class Noisy(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Rows with noise from torch's global generator."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = self.data[index]
        return x + 0.001 * torch.randn_like(x), y


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return functional.mse_loss(model(batch[0]), batch[1])


def bottlenecked() -> Task:
    """Four steps an epoch at a batch of 32."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS + 300, 8, generator=generator)
    y = torch.tanh(x @ torch.randn(8, 2, generator=generator))
    return Task(Bottlenecked(), Noisy(TensorDataset(x[:ROWS], y[:ROWS])), TensorDataset(x[ROWS:], y[ROWS:]), loss)
