"""Small tasks that tests name by import string."""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset
from torch.utils.data import TensorDataset

from esper.runtime.tolaria.tasks import Task

CALLS: list[str] = []


class Small(nn.Module):
    """12-8-8-3 with dropout and a batch normalisation, so that generators and buffers count."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.first = nn.Linear(12, 8)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 8)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = functional.relu(self.norm(self.first(x)))
        return self.last(self.dropout(functional.relu(self.second(x))))


def small_data(rows: int = 200) -> tuple[TensorDataset, TensorDataset]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows + 160, 12, generator=generator)
    weight = torch.randn(24, 12, generator=generator)
    y = (torch.relu(x @ weight.T) @ torch.randn(24, 3, generator=generator)).argmax(1)
    return TensorDataset(x[:rows], y[:rows]), TensorDataset(x[rows:], y[rows:])


def small_loss(model, batch):
    x, y = batch
    return functional.cross_entropy(model(x), y)


def accuracy(model, batch):
    x, y = batch
    return {"accuracy": (model(x).argmax(1) == y).float()}


def small(rows: int = 200, dropout: float = 0.1) -> Task:
    train, validation = small_data(rows)
    return Task(Small(dropout), train, validation, small_loss, test=validation, metrics=accuracy)


def partly_frozen() -> Task:
    """The first layer does not train."""
    task = small()
    task.model.first.requires_grad_(False)
    return task


def spiky() -> Task:
    """Every third row has one feature a thousand times larger than the rest."""
    task = small()
    task.train.tensors[0][::3, 0] = 1000.0
    return task


class Rows(Dataset):
    """A map-style dataset of dicts that draws noise from torch's global generator for every row."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        return {"x": x + 0.01 * torch.randn_like(x), "y": y}


def noisy() -> Task:
    train, validation = small_data(64)

    def loss(model, batch):
        return functional.cross_entropy(model(batch["x"]), batch["y"])

    return Task(Small(), Rows(train), Rows(validation), loss)


class Narrow(nn.Module):
    """A student with a layer of width one: what it lacks is known."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 1), nn.ReLU(), nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        return self.layers(x)


def narrow() -> Task:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(900, 8, generator=generator)
    y = torch.tanh(x @ torch.randn(8, 2, generator=generator))

    def loss(model, batch):
        return functional.mse_loss(model(batch[0]), batch[1])

    return Task(Narrow(), TensorDataset(x[:512], y[:512]), TensorDataset(x[512:], y[512:]), loss)


def exploding(at: int = 20) -> Task:
    task = small()
    calls = [0]

    def loss(model, batch):
        calls[0] += 1
        if model.training and calls[0] > at:
            raise ValueError("the data\nwent away")
        return small_loss(model, batch)

    task.loss = loss
    return task


def raising() -> Task:
    CALLS.append("raising")
    raise RuntimeError("first line\nno such table")


def wrong() -> int:
    return 3


def not_a_dataset() -> Task:
    return Task(Small(), iter(()), small_data()[1], "loss")  # type: ignore[arg-type]


constant = 4
