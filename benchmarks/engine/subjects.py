"""The models whose steps are timed: multilayer perceptrons by width, convolutional ones, a small transformer."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch import nn

CLASSES = 10
TOKENS = 64

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Subject:
    """One model under test, classifying into ten. `share` scales the rounds: short steps need more of them."""

    name: str
    model: Callable[[], nn.Module]
    sample: tuple[int, ...]
    rows: int
    share: int
    reads_ids: bool = False

    def batch(self) -> Batch:
        """Inputs (rows, *sample) and labels (rows,), from the global generator."""
        shape = (self.rows, *self.sample)
        x = torch.randint(0, TOKENS, shape) if self.reads_ids else torch.randn(shape)
        return x, torch.randint(0, CLASSES, (self.rows,))


class Transformer(nn.Module):
    """Token and position embeddings, two pre-norm encoder layers of width 64, the mean over places, a linear head.

    Input (rows, places) ids, output (rows, 10). Without dropout, so that arms can be compared to the bit.
    """

    def __init__(self, width: int = 64, places: int = 32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, width)
        self.places = nn.Parameter(0.02 * torch.randn(places, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.layers(self.tokens(ids) + self.places)
        classes: Tensor = self.head(hidden.mean(1))
        return classes


def perceptron(width: int, depth: int = 8) -> nn.Module:
    """`depth` hidden layers of one width, on 64 features."""
    layers: list[nn.Module] = [nn.Linear(64, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def convolutional(*, norm: bool) -> nn.Module:
    """Three convolutions, 16 to 64 channels, on images of 16 x 16; with `norm` a BatchNorm behind each."""
    layers: list[nn.Module] = []
    channels = (3, 16, 32, 64)
    for index, (before, after) in enumerate(pairwise(channels)):
        layers.append(nn.Conv2d(before, after, 3, padding=1, stride=2 if index else 1, bias=not norm))
        layers += [nn.BatchNorm2d(after)] if norm else []
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], CLASSES))


SUBJECTS = (
    Subject("MLP 8x64, batch 32", lambda: perceptron(64), (64,), 32, 10),
    Subject("MLP 8x256, batch 128", lambda: perceptron(256), (64,), 128, 2),
    Subject("MLP 8x512, batch 128", lambda: perceptron(512), (64,), 128, 1),
    Subject("CNN 16-32-64, batch 32", lambda: convolutional(norm=False), (3, 16, 16), 32, 4),
    Subject("CNN with BatchNorm, batch 32", lambda: convolutional(norm=True), (3, 16, 16), 32, 4),
    Subject("transformer 2x64, 32 places, batch 16", Transformer, (32,), 16, 2, reads_ids=True),
)
