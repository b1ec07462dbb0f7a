"""Running a model to look at it, and leaving it, its gradients and every random generator as they were."""

import random
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import ExitStack
from contextlib import contextmanager

import numpy
import torch
from torch import Tensor
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restores on exit, to the bit: buffers (BatchNorm statistics), gradients, training flags, and the random
    generators of torch (CPU and every CUDA device in use), numpy and Python."""
    buffers = [(m, name, b, b.detach().clone()) for m in model.modules() for name, b in _own_buffers(m)]
    gradients = [(p, p.grad) for p in model.parameters()]
    flags = [(m, m.training) for m in model.modules()]
    for parameter, _ in gradients:
        parameter.grad = None
    restore_random_state = captured_random_state()
    try:
        yield
    finally:
        restore_random_state()
        for module, training in flags:
            module.training = training
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for module, name, buffer, content in buffers:
                module._buffers[name] = buffer
                if not _same_bits(buffer, content):
                    buffer.copy_(content)


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Whatever the caller's training loop is in: no autocast, and tensors that can be trained (no inference mode)."""
    accelerator = torch.accelerator.current_accelerator()
    kinds = {"cpu"} if accelerator is None else {"cpu", accelerator.type}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in sorted(kinds):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def captured_random_state() -> Callable[[], None]:
    """Sets the random generators of torch (CPU and every CUDA device in use), numpy and Python back to what they are
    now, as often as it is called."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    numpy_state = numpy.random.get_state()
    python_state = random.getstate()

    def restore() -> None:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        torch.set_rng_state(cpu)

    return restore


def _own_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, buffer) for name, buffer in module._buffers.items() if buffer is not None]


def _same_bits(left: Tensor, right: Tensor) -> bool:
    # NaN must count as equal to itself here; writing an equal value is harmless, so no finer test is needed.
    # A buffer on the meta device has no content at all.
    return left.is_meta or (left.shape == right.shape and torch.equal(left, right))
