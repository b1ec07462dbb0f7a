"""One small model for every kind of host, with its input: what tests of sites run through."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import nn
from transformers.pytorch_utils import Conv1D


class Head(nn.Module):
    """`host`, then one linear layer that is no site, over the mean of whatever the host returned."""

    def __init__(self, host: nn.Module, width: int, axis: int = -1) -> None:
        super().__init__()
        self.host = host
        self.axis = axis
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(first(self.host(x)).movedim(self.axis, -1))


def first(returned: Any) -> Tensor:
    """The tensor in what the small modules here return."""
    if isinstance(returned, dict):
        return returned["hidden"]
    return returned[0] if isinstance(returned, tuple) else returned


class SelfAttention(nn.Module):
    """`host` as self-attention, called by keywords."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.host = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        attended, _ = self.host(key=x, value=x, query=x, need_weights=False)
        return self.out(attended)


class Residual(nn.Module):
    """A block that returns a dictionary, with something that is no tensor in it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        return {"note": "kept", "hidden": x + scale * self.down(torch.relu(self.up(x)))}


class Convolutional(nn.Module):
    """A residual block of convolutions that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + torch.relu(self.norm(self.conv(x))), None


@dataclass(frozen=True)
class Host:
    """`make()` gives a model whose site is `host`; `x` is its input; `kind` the descriptor, `form` the contract's."""

    make: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    kind: str
    form: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    axis: str


def _floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _ids(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(10, shape, generator=torch.Generator().manual_seed(1))


def _same(*shape: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return shape, shape


HOSTS: dict[str, Host] = {
    "linear": Host(lambda: Head(nn.Linear(6, 8), 8), _floats(4, 6), "linear", "linear", ((6,), (8,)), "last"),
    "linear_of_sequences": Host(
        lambda: Head(nn.Linear(6, 8), 8), _floats(4, 5, 6), "linear", "linear", ((5, 6), (5, 8)), "last"
    ),
    "transformers_conv1d": Host(
        lambda: Head(Conv1D(8, 6), 8),
        _floats(4, 5, 6),
        "transformers_conv1d",
        "linear",
        ((5, 6), (5, 8)),
        "last",
    ),
    "conv1d": Host(
        lambda: Head(nn.Conv1d(4, 6, 3, stride=2, padding=2, padding_mode="reflect", groups=2), 6, 1),
        _floats(3, 4, 9),
        "conv1d",
        "conv1d",
        ((4, 9), (6, 6)),
        "first",
    ),
    "conv1d_same": Host(
        lambda: Head(nn.Conv1d(4, 4, 4, padding="same", dilation=2), 4, 1),
        _floats(3, 4, 9),
        "conv1d",
        "conv1d",
        _same(4, 9),
        "first",
    ),
    "conv2d": Host(
        lambda: Head(nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2), 6, 1),
        _floats(3, 4, 6, 7),
        "conv2d",
        "conv2d",
        ((4, 6, 7), (6, 3, 5)),
        "first",
    ),
    "conv2d_circular": Host(
        lambda: Head(nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular"), 4, 1),
        _floats(3, 4, 6, 6),
        "conv2d",
        "conv2d",
        _same(4, 6, 6),
        "first",
    ),
    "embedding": Host(
        lambda: Head(nn.Embedding(10, 8, padding_idx=0), 8),
        _ids(4, 5),
        "embedding",
        "embedding",
        ((5,), (5, 8)),
        "last",
    ),
    "embedding_of_single_ids": Host(
        lambda: Head(nn.Embedding(10, 8), 8), _ids(4), "embedding", "embedding", ((), (8,)), "last"
    ),
    "layer_norm": Host(
        lambda: Head(nn.LayerNorm(8), 8), _floats(4, 5, 8), "layer_norm", "layer_norm", _same(5, 8), "last"
    ),
    "layer_norm_without_weights": Host(
        lambda: Head(nn.LayerNorm((5, 8), elementwise_affine=False), 8),
        _floats(4, 5, 8),
        "layer_norm",
        "layer_norm",
        _same(5, 8),
        "last",
    ),
    "group_norm": Host(
        lambda: Head(nn.GroupNorm(2, 4), 4, 1), _floats(3, 4, 6, 6), "group_norm", "group_norm", _same(4, 6, 6), "first"
    ),
    "batch_norm1d": Host(
        lambda: Head(nn.BatchNorm1d(4), 4), _floats(6, 4), "batch_norm", "batch_norm", _same(4), "first"
    ),
    "batch_norm2d": Host(
        lambda: Head(nn.BatchNorm2d(4), 4, 1),
        _floats(3, 4, 6, 6),
        "batch_norm",
        "batch_norm",
        _same(4, 6, 6),
        "first",
    ),
    "batch_norm3d": Host(
        lambda: Head(nn.BatchNorm3d(4), 4, 1),
        _floats(3, 4, 2, 3, 3),
        "batch_norm",
        "batch_norm",
        _same(4, 2, 3, 3),
        "first",
    ),
    "attention": Host(lambda: SelfAttention(True), _floats(4, 5, 8), "attention", "attention", _same(5, 8), "last"),
    "attention_time_first": Host(
        lambda: SelfAttention(False), _floats(5, 4, 8), "attention", "attention", _same(5, 8), "last"
    ),
    "block": Host(lambda: Head(Residual(), 8), _floats(4, 5, 8), "block", "block", _same(5, 8), "last"),
    "convolutional_block": Host(
        lambda: Head(Convolutional(), 4, 1), _floats(3, 4, 6, 6), "block", "block", _same(4, 6, 6), "first"
    ),
    "sequential_block": Host(
        lambda: Head(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)), 8),
        _floats(4, 8),
        "block",
        "block",
        _same(8),
        "last",
    ),
    "encoder_layer": Host(
        lambda: Head(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 8),
        _floats(4, 5, 8),
        "block",
        "block",
        _same(5, 8),
        "last",
    ),
    "encoder_layer_time_first": Host(
        lambda: Head(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0), 8),
        _floats(5, 4, 8),
        "block",
        "block",
        _same(5, 8),
        "last",
    ),
    "recurrent_block": Host(lambda: Head(nn.LSTM(8, 8), 8), _floats(5, 4, 8), "block", "block", _same(5, 8), "last"),
}


def made(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A model with seeded weights, and its input; equal arguments give equal bits."""
    torch.manual_seed(seed)
    return HOSTS[name].make(), HOSTS[name].x()


def stirred(model: nn.Module, site: str = "host", slot: int = 0) -> None:
    """Random weights for what is grown in one slot, as if it had learned something."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.get_submodule(f"{site}.kasmina.{slot}").parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
