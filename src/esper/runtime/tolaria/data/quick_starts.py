"""The packaged tasks: small honest problems with the sizes and models of the quick starts."""

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset
from torch.utils.data import TensorDataset

from esper.runtime.tolaria.data.cifar import CIFAR10
from esper.runtime.tolaria.data.cifar import CIFAR100
from esper.runtime.tolaria.data.cifar import CifarForm
from esper.runtime.tolaria.data.cifar import load_cifar
from esper.runtime.tolaria.data.digits import load_digits_splits
from esper.runtime.tolaria.data.small_gpt import SmallGPT
from esper.runtime.tolaria.data.source_text import VOCABULARY
from esper.runtime.tolaria.data.source_text import read_source_text
from esper.runtime.tolaria.data.source_text import windows

Batch = Any
Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TaskParts:
    """A task whose model is not drawn yet: `model()` draws it from the global generators.

    `data_digest` is that of the data, where it may differ from one machine to the next.
    """

    model: Callable[[], nn.Module]
    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    loss: Callable[[nn.Module, Batch], Tensor]
    metrics: Callable[[nn.Module, Batch], dict[str, Tensor]] | None = None
    data_digest: str | None = None


class Layered(nn.Module):
    """A plain feed-forward stack; its layers are named `layers.0`, `layers.1`, and so on."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layers(x)
        return output


class PixelNet(Layered):
    """A stack that reads uint8 images and scales them to [-1, 1] first."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.float32).div(127.5).sub(1.0))


def classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy of logits (batch, classes) against labels (batch,), in nats."""
    x, y = batch
    return functional.cross_entropy(model(x), y)


def classification_metrics(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """`accuracy`: one 0 or 1 a row."""
    x, y = batch
    return {"accuracy": (model(x).argmax(dim=1) == y).float()}


def regression_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error over all elements."""
    x, y = batch
    return functional.mse_loss(model(x), y)


def sequence_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy of logits (batch, places, symbols) against symbols (batch, places), in nats."""
    x, y = batch
    return functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


def sequence_metrics(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """`bits_per_character` and `accuracy` of the next symbol: for each row its mean over all places."""
    x, y = batch
    logits = model(x)
    nats = functional.cross_entropy(logits.transpose(1, 2), y, reduction="none")
    return {
        "bits_per_character": nats.mean(dim=1) / log(2.0),
        "accuracy": (logits.argmax(dim=2) == y).float().mean(dim=1),
    }


def digits(*, path: str | None = None, seed: int = 0, hidden: int = 10) -> TaskParts:
    """scikit-learn's handwritten digits and a multilayer perceptron deliberately too small: 64-10-10-10.

    Sites are `layers.0`, `layers.2` and `layers.4`.
    """
    train, validation, test = ((x.flatten(1), y) for x, y in load_digits_splits())

    def model() -> nn.Module:
        return Layered(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10))

    return _classification(model, train, validation, test)


def digits_cnn(*, path: str | None = None, seed: int = 0) -> TaskParts:
    """The same digits as images (1, 8, 8) and a convolutional network with three and four channels.

    Sites are `layers.0`, `layers.3` and `layers.7`.
    """
    train, validation, test = load_digits_splits()

    def model() -> nn.Module:
        return Layered(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(3, 4, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 10),
        )

    return _classification(model, train, validation, test)


def teacher(*, path: str | None = None, seed: int = 0, teacher_seed: int | None = None) -> TaskParts:
    """A random teacher 16-24-24-4 and a student 16-12-2-12-4: its width of two is the planted narrow place.

    Standard normal inputs, targets with mean 0 and variance 1 over the training rows; 4,000 rows to train on,
    2,000 to validate, 2,000 to test. The teacher is drawn from an own generator seeded with `teacher_seed`
    (default: the run's seed).
    """
    generator = torch.Generator().manual_seed(seed if teacher_seed is None else teacher_seed)
    widths = (16, 24, 24, 4)
    weights = [
        torch.randn(fan_out, fan_in, generator=generator) * (2.0 / fan_in) ** 0.5
        for fan_in, fan_out in pairwise(widths)
    ]
    biases = [0.5 * torch.randn(width, generator=generator) for width in widths[1:]]
    x = torch.randn(8000, widths[0], generator=generator)
    y = x
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        y = functional.linear(y if index == 0 else functional.relu(y), weight, bias)
    y = (y - y[:4000].mean(dim=0)) / y[:4000].std(dim=0)

    def model() -> nn.Module:
        return Layered(
            nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 2), nn.ReLU(), nn.Linear(2, 12), nn.ReLU(), nn.Linear(12, 4)
        )

    return TaskParts(
        model,
        TensorDataset(x[:4000], y[:4000]),
        TensorDataset(x[4000:6000], y[4000:6000]),
        TensorDataset(x[6000:], y[6000:]),
        regression_loss,
    )


def charlm(
    *,
    path: str | None = None,
    seed: int = 0,
    context: int = 64,
    width: int = 48,
    heads: int = 4,
    layers: int = 1,
    hidden: int = 2,
) -> TaskParts:
    """The next character of the standard library's source, by a small GPT whose perceptron is far too narrow:
    `hidden` units between layers of `width`, where GPT-2 has four times `width`.

    `path` names another folder with the same modules. A row is `context` characters; files, not rows, are split
    into train, validation and test (`source_text.MODULES`).
    """
    text = read_source_text(None if path is None else Path(path))
    train, validation, test = (
        TensorDataset(*windows(list(part.values()), context)) for part in (text.train, text.validation, text.test)
    )

    def model() -> nn.Module:
        return SmallGPT(vocabulary=VOCABULARY, context=context, width=width, heads=heads, layers=layers, hidden=hidden)

    return TaskParts(model, train, validation, test, sequence_loss, sequence_metrics, text.digest)


def _classification(model: Callable[[], nn.Module], train: Split, validation: Split, test: Split) -> TaskParts:
    return TaskParts(
        model=model,
        train=TensorDataset(*train),
        validation=TensorDataset(*validation),
        test=TensorDataset(*test),
        loss=classification_loss,
        metrics=classification_metrics,
    )


def _cifar(form: CifarForm, path: str | None) -> TaskParts:
    train, validation, test = load_cifar(form, None if path is None else Path(path))

    def model() -> nn.Module:
        return PixelNet(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(512, form.classes),
        )

    return _classification(model, train, validation, test)


def cifar10(*, path: str | None = None, seed: int = 0) -> TaskParts:
    """CIFAR-10, binary version, in folder `path`: 45,000 images to train on, 5,000 to validate, 10,000 to test."""
    return _cifar(CIFAR10, path)


def cifar100(*, path: str | None = None, seed: int = 0) -> TaskParts:
    """CIFAR-100 (fine labels), binary version, in folder `path`, split as `cifar10`."""
    return _cifar(CIFAR100, path)


PACKAGED_TASKS: Mapping[str, Callable[..., TaskParts]] = {
    "digits": digits,
    "digits-cnn": digits_cnn,
    "teacher": teacher,
    "charlm": charlm,
    "cifar10": cifar10,
    "cifar100": cifar100,
}
"""Task name to its factory; each takes `path`, `seed` and the task's own arguments."""
