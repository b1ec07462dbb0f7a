"""The training loss of an epoch, summed without an operation or a wait for the device in any step."""

import torch
from torch import Tensor

TOGETHER = 512
"""Losses that are kept in one tensor."""


class LossSum:
    """The sum of loss times rows: products in the loss's own dtype, added in float64 in the order of the steps.

    So it is the same whether it is read once at the end or, by a checkpoint, in between.
    """

    def __init__(self) -> None:
        self._total = 0.0
        self._stacked: list[tuple[Tensor, list[int]]] = []
        self._losses: list[Tensor] = []
        self._rows: list[int] = []

    def add(self, loss: Tensor, rows: int) -> None:
        """Take the mean loss (a scalar) of one step over `rows` rows."""
        self._losses.append(loss)
        self._rows.append(rows)
        if len(self._rows) == TOGETHER:
            self._stack()

    def fill_(self, total: float) -> None:
        """Begin anew at `total`."""
        self._stacked, self._losses, self._rows = [], [], []
        self._total = total

    def zero_(self) -> None:
        self.fill_(0.0)

    def __float__(self) -> float:
        """The sum so far; waits for the device."""
        self._stack()
        for losses, rows in self._stacked:
            products: list[float] = (losses.cpu() * torch.tensor(rows, dtype=losses.dtype)).tolist()
            for product in products:
                self._total += product
        self._stacked = []
        return self._total

    def _stack(self) -> None:
        if self._rows:
            self._stacked.append((torch.stack(self._losses), self._rows))
            self._losses, self._rows = [], []
