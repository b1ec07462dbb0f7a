"""Kernels that misbehave. The IR can express none of it, so a stand-in takes the place of a kernel's forward."""

import time
from collections.abc import Callable
from collections.abc import Container
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from esper.runtime.tezzeret.build import KernelModule

Fault = Callable[[Tensor], Tensor]
"""What becomes of the output of a kernel."""


class _FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        torch.rand(7)
        raise RuntimeError("the kernel fails on the way back")


class _EndlessGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("inf")


def raises(output: Tensor) -> Tensor:
    """Draws from the run's generator first."""
    torch.rand(7)
    raise ValueError("the kernel\nfails")


def raises_backward(output: Tensor) -> Tensor:
    failed: Tensor = _FailsBackward.apply(output)
    return failed


def gives_nan(output: Tensor) -> Tensor:
    return output + float("nan")


def gives_endless_gradients(output: Tensor) -> Tensor:
    endless: Tensor = _EndlessGradient.apply(output)
    return endless


def runs_out_of_memory(output: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def is_slow(output: Tensor) -> Tensor:
    time.sleep(0.02)
    return output


@contextmanager
def failing(
    fault: Fault, steps: Container[int], step: Callable[[], int], *, evaluating: bool = False
) -> Iterator[None]:
    """Inside, every kernel has the fault while the step `step()` is taken, if it is one of `steps`; with `evaluating`,
    only in forwards without gradients instead."""
    forward = KernelModule.forward

    def faulty(self: KernelModule, x: Tensor) -> Tensor:
        output = forward(self, x)
        if step() in steps and torch.is_grad_enabled() is not evaluating:
            return fault(output)
        return output

    KernelModule.forward = faulty  # type: ignore[method-assign]
    try:
        yield
    finally:
        KernelModule.forward = forward  # type: ignore[method-assign]
