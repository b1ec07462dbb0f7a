"""Running kernels compiled, where the configuration wants it, without giving up that runs repeat bit for bit.

Compiled and eager kernels differ in the last bits, so which of the two runs must not depend on how fast a compiler
was: a kernel is compiled before its first step, on the thread that installs it, while training goes on.
"""

from collections.abc import Callable
from time import monotonic

import torch

from esper.contracts.config import CompileMode
from esper.contracts.config import TezzeretConfig
from esper.contracts.operational import LayerGraph
from esper.runtime.kasmina.lineage import layer_graph
from esper.runtime.tezzeret.build import KernelModule
from esper.runtime.tezzeret.compile import warm
from esper.runtime.tezzeret.parity import c_compiler
from esper.runtime.tolaria.live.surgery import grown_kernels
from esper.runtime.tolaria.trainee import Trainee

POLL_SECONDS = 0.2


def wants_compiled(config: TezzeretConfig, device: torch.device) -> bool:
    """`auto` compiles on CUDA only: on the CPU it was measured to gain nothing."""
    return config.compile is CompileMode.ON or (config.compile is CompileMode.AUTO and device.type == "cuda")


def no_compiler(config: TezzeretConfig, device: torch.device) -> tuple[str, ...]:
    """What a run says of itself when it wants compiled kernels on a machine that cannot compile."""
    if wants_compiled(config, device) and device.type == "cpu" and c_compiler() is None:
        return ("tezzeret.compile is on, but there is no C compiler here: kernels run eagerly",)
    return ()


def compile_kernel(
    kernel: KernelModule, graph: LayerGraph, device: torch.device, limit_seconds: float, tick: Callable[[], None]
) -> str | None:
    """Compile a kernel and let it run compiled from its next call on. Returns why it stays eager, if it does.

    Blocks until the compiler is done, at most `limit_seconds`; `tick` is called meanwhile. No global random
    generator is touched.
    """
    site = kernel.manifest.site
    dtype = next(kernel.parameters()).dtype
    # What the first layer reads are data, and need no gradient.
    behind = any(node.contract.site == site.site and node.depth > 0 for node in graph.nodes)
    example = torch.zeros((2, *site.input_shape), device=device, dtype=dtype, requires_grad=behind)
    compiled = warm(kernel, example)
    until = monotonic() + limit_seconds
    while not compiled.wait(POLL_SECONDS):
        tick()
        if monotonic() > until:
            return f"compiling took longer than {limit_seconds:g} s"
    return None if compiled.use_compiled() else compiled.reason


def compile_grown(trainee: Trainee, tick: Callable[[], None]) -> tuple[str, ...]:
    """Compile every kernel of a model that was rebuilt, as they were before. Returns why some stay eager."""
    plan, model = trainee.plan, trainee.model
    kernels = grown_kernels(model)
    if not kernels or not wants_compiled(plan.config.tezzeret, plan.device):
        return ()
    graph = layer_graph(model, lambda: plan.loss(model, plan.first_batch()))
    limit = plan.config.tezzeret.timeout_s
    found = {kernel.digest: compile_kernel(kernel, graph, plan.device, limit, tick) for kernel in kernels}
    return tuple(f"kernel {digest[:19]} runs eagerly: {reason}" for digest, reason in found.items() if reason)
