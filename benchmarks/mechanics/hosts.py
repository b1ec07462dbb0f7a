"""Tiny models in which each kind of site is met, as its users meet it: between other layers, trained, with a batch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import nn
from transformers.pytorch_utils import Conv1D

import esper
from esper.runtime.kasmina.wrapping.hosts import HOST_KINDS

ROWS = 6
VOCABULARY = 11


@dataclass(frozen=True)
class Host:
    """One model with one site. `kind` is that of the site (`HOST_KINDS`), `targets` the classes that are wrapped,
    none for every layer."""

    name: str
    kind: str
    site: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    targets: tuple[type[nn.Module], ...] = ()
    ids: bool = False
    time_first: bool = False

    def model(self) -> nn.Module:
        """Always the same weights, whatever the process has drawn before."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().train()

    def wrapped(self) -> nn.Module:
        """The model, wrapped, with its sites proven."""
        return esper.wrap(self.model(), list(self.targets) or "auto", example_inputs=(self.batch(),))

    def batch(self) -> Tensor:
        """`ROWS` seeded samples."""
        generator = torch.Generator().manual_seed(1)
        form = (self.shape[0], ROWS, *self.shape[1:]) if self.time_first else (ROWS, *self.shape)
        if self.ids:
            return torch.randint(0, VOCABULARY, form, generator=generator)
        return torch.randn(form, generator=generator)


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence with itself, then a linear layer."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.mix(x, x, x, need_weights=False)
        return self.head(mixed)


class Residual(nn.Module):
    """A pre-norm residual block of a transformer, without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.wide = nn.Linear(8, 12)
        self.narrow = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(nn.functional.gelu(self.wide(self.norm(x))))


class ConvResidual(nn.Module):
    """A residual block of an image network."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(x + self.second(nn.functional.relu(self.norm(self.first(x)))))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def _sequence_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))


def _transformers_mlp() -> nn.Module:
    return nn.Sequential(Conv1D(12, 6), nn.GELU(), Conv1D(6, 12))


def _conv1d() -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 4, 3, padding=1))


def _conv2d() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))


def _strided() -> nn.Module:
    first = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2, padding_mode="reflect")
    return nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1))


def _embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, 4))


def _layer_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4))


def _group_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def _batch_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def _flat_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


def _block() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), Residual(), nn.Linear(8, 4))


def _conv_block() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), ConvResidual(), nn.Conv2d(8, 4, 1))


HOSTS: tuple[Host, ...] = (
    Host("mlp", "linear", "0", _mlp, (6,)),
    Host("mlp of a sequence", "linear", "0", _sequence_mlp, (5, 6)),
    Host("mlp of transformers", "transformers_conv1d", "0", _transformers_mlp, (5, 6)),
    Host("signal", "conv1d", "0", _conv1d, (3, 8)),
    Host("image", "conv2d", "0", _conv2d, (3, 6, 6)),
    Host("strided, grouped image", "conv2d", "0", _strided, (4, 8, 8)),
    Host("embedding", "embedding", "0", _embedding, (5,), ids=True),
    Host("layer norm", "layer_norm", "1", _layer_norm, (5, 6)),
    Host("group norm", "group_norm", "1", _group_norm, (3, 6, 6)),
    Host("batch norm", "batch_norm", "1", _batch_norm, (3, 6, 6)),
    Host("batch norm without places", "batch_norm", "1", _flat_batch_norm, (6,)),
    Host("attention", "attention", "mix", lambda: SelfAttention(True), (5, 8)),
    Host("attention, time first", "attention", "mix", lambda: SelfAttention(False), (5, 8), time_first=True),
    Host("residual block", "block", "1", _block, (5, 6), (Residual,)),
    Host("image residual block", "block", "1", _conv_block, (3, 6, 6), (ConvResidual,)),
)


def kinds_without_host() -> tuple[str, ...]:
    """Kinds of sites that the registry knows and no model here has: a gap in the suite."""
    met = {host.kind for host in HOSTS}
    return tuple(kind.name for kind in HOST_KINDS if kind.name not in met)


def host_named(name: str) -> Host:
    """The host of that name. Raises KeyError for one that is not in the table."""
    return {host.name: host for host in HOSTS}[name]
