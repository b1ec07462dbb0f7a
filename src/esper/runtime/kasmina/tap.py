"""What the first layer of a pair read, on its way to the second one's output."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esper.errors import GrowthError
from esper.runtime.kasmina.bank import activate

MAX_STEPS = 64
"""Operations between the two layers of a pair that are looked through for where a tensor comes from."""


class Tap:
    """The calls of one pair's first layer that the second has not answered yet.

    Several calls of the first may be open at once (one module in two towers): each call of the second is then matched
    by its input, which must come from what that call of the first returned. A call that was answered is remembered
    for as long as autograd keeps the tensors between the two layers: activation checkpointing calls the second layer
    again, perhaps alone.
    """

    def __init__(self, source: str, target: str, activation: str | None) -> None:
        self.source = source
        self.target = target
        self.activation = activation
        """The one elementwise operation between the two layers; None where there is more than that."""
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._answered: list[_Answered] = []

    def push(self, x: Tensor, output: Tensor) -> None:
        self._pending.append((x, output))

    def pop(self, received: Tensor) -> Tensor:
        """The input of the first layer's call that led to `received`. Raises GrowthError ESP-439 if there is none."""
        x = self._open(received)
        if x is None:
            x = self._again(received)
        if x is None:
            raise GrowthError(
                "ESP-439",
                f"'{self.target}' was called on something that '{self.source}' did not compute, but a block that was "
                "grown across the two needs both",
                hint=f"call the layers in pairs, or cull the block at '{self.source}'",
            )
        return x

    def clear(self) -> None:
        self._pending.clear()

    def _open(self, received: Tensor) -> Tensor | None:
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self._answered = [answered for answered in self._answered if answered.alive()]
        # What was answered belongs to calls that were not compiled: here it would only break the graph.
        alone = len(self._pending) == 1 and (compiling or not self._answered)
        for index, (x, output) in enumerate(self._pending):
            if alone or self._leads_to(output, received):
                del self._pending[index]
                if not compiling:
                    self._answered.append(_Answered(x, weakref.ref(output), weakref.ref(received)))
                return x
        return None

    def _again(self, received: Tensor) -> Tensor | None:
        for answered in self._answered:
            output, before = answered.output(), answered.received()
            if (before is not None and _same(before, received)) or (
                output is not None and self._leads_to(output, received)
            ):
                return answered.x
        return None

    def _leads_to(self, output: Tensor, received: Tensor) -> bool:
        if output.shape == received.shape and output.data_ptr() == received.data_ptr():
            return True
        if output.grad_fn is not None and _comes_from(received.grad_fn, output.grad_fn):
            return True
        if self.activation is None or output.shape != received.shape:
            return False
        with torch.no_grad():
            return torch.equal(activate(self.activation, output), received)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model begins with no call open.
        return self.__dict__ | {"_pending": [], "_answered": []}


@dataclass(frozen=True)
class _Answered:
    """One answered call: what the first layer read, and weakly what it returned and what the second one received."""

    x: Tensor
    output: weakref.ref[Tensor]
    received: weakref.ref[Tensor]

    def alive(self) -> bool:
        return self.output() is not None or self.received() is not None


def _same(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return left.data_ptr() == right.data_ptr() or torch.equal(left.detach(), right.detach())


def _comes_from(node: Any, source: Any) -> bool:
    """Whether one operation's result was computed from another's, a few operations before."""
    steps = 0
    todo, seen = [] if node is None else [node], set()
    while todo and steps < MAX_STEPS:
        node = todo.pop(0)
        if node is source:
            return True
        if node in seen:
            continue
        seen.add(node)
        steps += 1
        todo.extend(below for below, _ in node.next_functions if below is not None)
    return False
