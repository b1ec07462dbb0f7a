"""The work that all methods do: data, hosts deliberately too narrow, and one way to train them.

Batches, their order, optimizer and schedule depend on nothing but seed and learning rate.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import nn
from torch.nn import functional

from esper.runtime.tolaria.data.digits import load_digits_splits

BATCH = 64
WEIGHT_DECAY = 0.01

Rows = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Work:
    """One widening: `host(width)` is a sequence whose layers 0 and 2 have `width` units and a ReLU between them, and
    `added` units come to `narrow` ones. `grid` are the learning rates of all methods."""

    name: str
    host: Callable[[int], nn.Sequential]
    narrow: int
    added: int
    grid: tuple[float, ...]


@dataclass(frozen=True)
class Data:
    """Images (rows, 1, 8, 8) and labels (rows,)."""

    train: Rows
    validation: Rows
    test: Rows


@dataclass
class Learner:
    """A model and what trains it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: a cosine from `lr` to zero over `steps` steps, growth before step `growth`."""

    lr: float
    seed: int
    steps: int
    growth: int

    def rate(self, step: int) -> float:
        return self.lr * 0.5 * (1.0 + math.cos(math.pi * step / self.steps))


def perceptron(width: int) -> nn.Sequential:
    """64 - width - 10, on flat images."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def convolutional(width: int) -> nn.Sequential:
    """Two convolutions of 3 x 3, `width` and 8 channels, a pool to 2 x 2, and a linear head."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


WORKS = (
    Work("MLP 64-8-10", perceptron, 8, 8, (0.01, 0.03, 0.1)),
    Work("CNN 1-3-8, 3x3", convolutional, 3, 5, (0.003, 0.01, 0.03)),
)
"""The MLP grows by 8: gromo adds at most as many units at once as the second layer has outputs."""


def load(work: Work) -> Data:
    """scikit-learn's handwritten digits, each training image also shifted by a pixel: 9,000, 500 and 297 rows."""
    flat = work.host is perceptron
    train, validation, test = (((x.flatten(1) if flat else x), y) for x, y in load_digits_splits())
    return Data(train, validation, test)


def begin(work: Work, width: int, recipe: Recipe) -> Learner:
    """An untrained model."""
    torch.manual_seed(recipe.seed)
    model = work.host(width)
    return Learner(model, new_optimizer(model, recipe))


def new_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=WEIGHT_DECAY)


def train(learner: Learner, data: Data, recipe: Recipe, steps: range) -> None:
    """Take these steps of the recipe."""
    x, y = data.train
    learner.model.train()
    for step in steps:
        for group in learner.optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        rows = _rows(len(y), recipe.seed, step)
        learner.optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(learner.model(x[rows]), y[rows]).backward()
        learner.optimizer.step()


@torch.no_grad()
def loss_of(model: nn.Module, rows: Rows) -> float:
    """Mean cross entropy, in evaluation mode."""
    model.eval()
    return float(functional.cross_entropy(model(rows[0]), rows[1]))


def _rows(count: int, seed: int, step: int) -> Tensor:
    """Rows of one batch: every epoch is a new permutation, the incomplete last batch is left out."""
    epoch, position = divmod(step, count // BATCH)
    order = torch.randperm(count, generator=torch.Generator().manual_seed((seed + 1) * 1_000_003 + epoch))
    return order[position * BATCH : (position + 1) * BATCH]
