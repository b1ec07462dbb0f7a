"""The trainer's side of compilation: a kernel is compiled off the training thread and runs eagerly until then.

Dynamo saves the global random generators before it compiles and puts them back after. On a thread beside training
that would take back what training has drawn meanwhile (measured: torch's and Python's sequences both repeated), so
while a kernel is being compiled those restores do nothing on the compiling thread. The training thread never
compiles: what was not warmed (another dtype, layout, grad mode, a batch of one) runs eagerly.
"""

import contextlib
import copy
import random
import threading
from collections.abc import Callable
from collections.abc import Iterator

import torch
from torch import Tensor
from torch import fx
from torch._dynamo.exc import TorchDynamoException

from esper.runtime.tezzeret.module import KernelModule
from esper.runtime.tezzeret.parity import c_compiler

_ONE_AT_A_TIME = threading.Lock()

Situation = tuple[object, ...]


class CompiledKernel:
    """A kernel and its compiled form, once there is one.

    `ready`: warm, and `use_compiled` will switch to it. `reason`: why the kernel stays eager; None while it is being
    compiled or when it is ready. Which of the two runs changes the last bits of a result: a caller that promises
    bits waits (`wait`) before the kernel's first step, and switches at a step boundary.
    """

    def __init__(self, kernel: KernelModule) -> None:
        self.kernel = kernel
        self.reason: str | None = None
        self._traced = fx.symbolic_trace(copy.deepcopy(kernel))
        # The traced module has code of its own: Dynamo's limit of recompilations is per code.
        self._compiled: Callable[[Tensor], Tensor] = torch.compile(self._traced, fullgraph=True, dynamic=True)
        self._warm: frozenset[Situation] = frozenset()
        self._done = threading.Event()

    @property
    def ready(self) -> bool:
        """True once the compiled form is warm."""
        return self._done.is_set() and self.reason is None

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until compiling has ended, in one way or the other; False when it has not after `timeout_s`."""
        return self._done.wait(timeout_s)

    def use_compiled(self) -> bool:
        """From now on the kernel runs compiled where it is warm. To be called on the training thread between two
        steps; False, and nothing changes, while it is not ready."""
        if not self.ready:
            return False
        # The compiled code takes weights as inputs: the kernel's own in place of those it was warmed with.
        for name in self._traced._modules:
            self._traced._modules[name] = self.kernel._modules[name]
        self.kernel.accelerated = self
        return True

    def use_eager(self) -> None:
        """Back to eager, on the training thread between two steps."""
        self.kernel.accelerated = None

    def covers(self, x: Tensor) -> bool:
        """Whether a call with this input (batch, *input_shape) would run without compiling."""
        return x.shape[0] > 1 and _situation(x) in self._warm

    def __call__(self, x: Tensor) -> Tensor:
        """The delta, by the compiled form. x: (batch, *input_shape), covered."""
        return self._compiled(x)

    def _warm_up(self, example: Tensor) -> None:
        x = example.detach().requires_grad_(example.requires_grad)
        situations = []
        with torch.enable_grad():
            output = self._compiled(x)
            inputs = [*self._traced.parameters(), *([x] if x.requires_grad else [])]
            torch.autograd.grad(output, inputs, torch.ones_like(output))
            situations.append(_situation(x))
        with torch.no_grad():
            self._compiled(x.detach())
            situations.append(_situation(x.detach()))
        self._warm = frozenset(situations)


def warm(
    kernel: KernelModule, example: Tensor, on_ready: Callable[[CompiledKernel], None] | None = None
) -> CompiledKernel:
    """Begin to compile a kernel in the background, for inputs like `example` (batch of two or more, *input_shape;
    its device, dtype, layout and `requires_grad` count, its numbers do not).

    Returns at once. `on_ready` is called on the background thread when compiling has ended, also when the kernel
    stays eager. The kernel itself, its gradients and all random generators stay as they are.
    """
    compiled = CompiledKernel(kernel)
    if example.device.type == "cpu" and c_compiler() is None:
        compiled.reason = "no C++ compiler on this machine"
        _finish(compiled, on_ready)
        return compiled
    example = example.detach().clone(memory_format=torch.preserve_format).requires_grad_(example.requires_grad)
    if example.shape[0] < 2:
        # Dynamo specialises on sizes of one.
        example = example.detach().repeat(2, *[1] * (example.dim() - 1)).requires_grad_(example.requires_grad)
    arguments = (compiled, example, on_ready)
    threading.Thread(target=_compile, args=arguments, name="esper-compile", daemon=True).start()
    return compiled


def _compile(compiled: CompiledKernel, example: Tensor, on_ready: Callable[[CompiledKernel], None] | None) -> None:
    with _ONE_AT_A_TIME, _generators_left_alone():
        try:
            compiled._warm_up(example)
        except (TorchDynamoException, RuntimeError, AssertionError, OSError) as error:
            lines = str(error).strip().splitlines()
            compiled.reason = f"compiling failed: {lines[0] if lines else type(error).__name__}"
    _finish(compiled, on_ready)


def _finish(compiled: CompiledKernel, on_ready: Callable[[CompiledKernel], None] | None) -> None:
    compiled._done.set()
    if on_ready is not None:
        on_ready(compiled)


def _situation(x: Tensor) -> Situation:
    """All that Dynamo guards on of a call, but for the batch size."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(x.device.type),
        x.requires_grad,
        x.dtype,
        x.device,
        tuple(x.shape[1:]),
        x.is_contiguous(),
    )


@contextlib.contextmanager
def _generators_left_alone() -> Iterator[None]:
    """While this lasts, setting the state of a global generator does nothing on this thread; others are not touched.
    One thread at a time may be in here."""
    thread = threading.get_ident()
    kept = (torch.random.set_rng_state, torch.cuda.set_rng_state, random.setstate)

    def elsewhere(setter: Callable[..., None]) -> Callable[..., None]:
        def guarded(*arguments: object, **named: object) -> None:
            if threading.get_ident() != thread:
                setter(*arguments, **named)

        return guarded

    torch.random.set_rng_state, torch.cuda.set_rng_state, random.setstate = (elsewhere(setter) for setter in kept)
    try:
        yield
    finally:
        torch.random.set_rng_state, torch.cuda.set_rng_state, random.setstate = kept
