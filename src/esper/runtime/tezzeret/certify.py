"""The birth certificate: measured facts of one kernel, without the model that it is for.

It is measured on shipped samples (layer input X, output gradient G), else on seeded random ones. Checks, by the name
that a failure begins with:

    birth       the delta is exactly zero, so the graft preserves the function to the bit
    shape       the delta has the site's output shape and dtype
    finite      output, gradients and parameters are finite through two optimizer steps
    gradient    every parameter gets a non-zero gradient within two steps (a zero before a ReLU never does)
    drift       a small step of the run's optimizer moves the output by no more than `DRIFT_LIMIT` times what that
                step would do through a plain layer of equal fan-in. Sound kernels move less than 5 times, a zero
                inside a normalisation 1 / sqrt(epsilon), some 300 times, until it saturates at full size
    cost        parameters and floating point operations are those of the IR
    parity      compiled and eager agree
"""

import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from esper.contracts.assets import Certificate
from esper.contracts.config import OptimizerConfig
from esper.runtime.tezzeret import parity
from esper.runtime.tezzeret.artifact import KernelFiles
from esper.runtime.tezzeret.blueprints import host_graph
from esper.runtime.tezzeret.build import load_kernel
from esper.runtime.tezzeret.ir import check_graph
from esper.runtime.tezzeret.module import TORCH_DTYPES
from esper.runtime.tezzeret.module import GraphModule
from esper.runtime.tezzeret.module import KernelModule
from esper.runtime.tezzeret.samples import SiteSamples
from esper.runtime.tezzeret.samples import check_samples
from esper.runtime.tezzeret.samples import sample_rows
from esper.runtime.tezzeret.samples import seeded_samples

DRIFT_LIMIT = 30.0
SMALL_STEP = 0.01
"""The share of the learning rate at which the drift is judged: at the whole of it a jump may have saturated."""
CERTIFIED_ROWS = 256
RANDOM_ROWS = 64
TIMED_ROWS = 32
TIMED_CALLS = 15


@dataclass(frozen=True)
class _Steps:
    """What optimizer steps did: the delta after the first, names with a gradient, names not finite."""

    delta: Tensor
    with_gradient: frozenset[str]
    not_finite: tuple[str, ...]


def certify(
    files: KernelFiles,
    *,
    samples: SiteSamples | None,
    host: nn.Module | None = None,
    optimizer: OptimizerConfig | None = None,
    compile: bool = False,
) -> Certificate:
    """Measure a kernel in this process and say whether it may be grafted (`passed`, else `failures` by name).

    `drift` is the root mean square of the delta after one step, relative to that of the host's output; without
    `host` the scale is that of the layer's input, which a variance-preserving layer keeps. `optimizer` defaults to
    Esper's own; its peak learning rate is used. The kernel that is measured is a private copy; the global random
    generators are not drawn from. Raises IntegrityError ESP-401..405 when the files are not a kernel, BlueprintError
    ESP-414, ESP-417 when the samples are not of its site.
    """
    settings = optimizer if optimizer is not None else OptimizerConfig()
    with torch.enable_grad(), torch.device("cpu"):
        kernel = load_kernel(files, files.digest)
        site = kernel.manifest.site
        if samples is not None:
            check_samples(samples, site)
        x, g = _evidence(kernel, samples)
        failures = _birth_failures(kernel, x)
        birth = _largest(kernel(x).detach()) if not failures or failures[0].startswith("birth") else math.inf
        timed = x[:TIMED_ROWS]
        forward_us = _median_us(lambda: kernel(timed))
        host_module = host if host is not None else _reference(kernel)
        host_us = _median_us(lambda: host_module(timed))
        flops, host_flops = _flops(kernel, x[:1]), _flops(host_module, x[:1])
        failures += _cost_failures(kernel, flops)
        compiled = parity.Parity("off")
        drift, with_gradient = 0.0, frozenset[str]()
        total = len(list(kernel.named_parameters()))
        if not any(failure.startswith("shape") for failure in failures):
            small = _relative_drift(load_kernel(files, files.digest), x, g, settings)
            steps = _step(kernel, x, g, settings, count=2)
            with_gradient = steps.with_gradient
            drift = _rms(steps.delta) / _scale(host_module(x).detach() if host is not None else x)
            failures += _step_failures(kernel, steps, small)
            if compile:
                compiled = parity.compare(kernel, timed, g[: timed.shape[0]])
                if not compiled.agrees:
                    failures.append(f"parity: compiled and eager differ by {compiled.difference:.3g}")
    return Certificate(
        kernel=files.digest,
        passed=not failures,
        failures=tuple(failures),
        birth_difference=_finite(birth),
        first_step_drift=_finite(drift),
        parameters_with_gradient=len(with_gradient),
        parameters_total=total,
        parameter_count=sum(p.numel() for p in kernel.parameters()),
        flops_per_sample=flops,
        host_flops_per_sample=host_flops,
        forward_us=forward_us,
        host_forward_us=host_us,
        compiled=compiled.outcome,
        compiled_difference=None if compiled.difference is None else _finite(compiled.difference),
        torch_version=torch.__version__,
        forge=f"{platform.node()}/{platform.machine()}",
    )


def _evidence(kernel: KernelModule, samples: SiteSamples | None) -> tuple[Tensor, Tensor]:
    """X and G in the kernel's dtype. A gradient of zero everywhere proves nothing: it is replaced by a seeded one."""
    site = kernel.manifest.site
    dtype = TORCH_DTYPES[site.dtype]
    generator = torch.Generator(device="cpu").manual_seed(int(kernel.digest[-12:], 16))
    if samples is None:
        stand_in = seeded_samples(site, dtype, RANDOM_ROWS, generator)
        return stand_in.x, stand_in.g
    rows = sample_rows(samples, CERTIFIED_ROWS)
    x, g = rows.x.to(dtype), rows.g.to(dtype)
    if not bool(g.any()):
        g = seeded_samples(site, dtype, x.shape[0], generator).g
    return x, g


def _reference(kernel: KernelModule) -> GraphModule:
    """A zero layer of the host's geometry, in the kernel's dtype."""
    site = kernel.manifest.site
    graph = host_graph(site)
    dtype = TORCH_DTYPES[site.dtype]
    shapes = check_graph(graph).tensors()
    zeros = {name: torch.zeros(shape, dtype=dtype, device="cpu") for name, shape in shapes.items()}
    return GraphModule(graph, zeros, dtype)


def _birth_failures(kernel: KernelModule, x: Tensor) -> list[str]:
    delta = kernel(x).detach()
    site = kernel.manifest.site
    if tuple(delta.shape) != (x.shape[0], *site.output_shape) or delta.dtype != x.dtype:
        return [f"shape: delta is {tuple(delta.shape)} {delta.dtype}, the site needs (rows, *{site.output_shape})"]
    # Not finite counts as a difference: NaN is not zero.
    return [] if _largest(delta) == 0.0 else [f"birth: the delta is not zero but up to {_largest(delta):.3g}"]


def _step(module: nn.Module, x: Tensor, g: Tensor, settings: OptimizerConfig, *, count: int) -> _Steps:
    parameters = dict(module.named_parameters())
    optimizer = _optimizer(list(parameters.values()), settings)
    with_gradient: set[str] = set()
    broken: set[str] = set()
    after_first: Tensor | None = None
    for _ in range(count):
        optimizer.zero_grad(set_to_none=True)
        module(x).backward(g)
        for name, parameter in parameters.items():
            if parameter.grad is not None and bool(parameter.grad.any()):
                with_gradient.add(name)
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                broken.add(f"gradient of {name}")
        if settings.clip is not None:
            nn.utils.clip_grad_norm_(parameters.values(), settings.clip)
        optimizer.step()
        output = module(x).detach()
        after_first = output if after_first is None else after_first
        broken |= {name for name, p in parameters.items() if not bool(p.detach().isfinite().all())}
        if not bool(output.isfinite().all()):
            broken.add("output")
    optimizer.zero_grad(set_to_none=True)
    assert after_first is not None
    return _Steps(after_first, frozenset(with_gradient), tuple(sorted(broken)))


def _optimizer(parameters: list[nn.Parameter], settings: OptimizerConfig) -> torch.optim.Optimizer:
    if settings.name == "sgd":
        return torch.optim.SGD(
            parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    return kind(parameters, lr=settings.lr, weight_decay=settings.weight_decay)


def _relative_drift(kernel: KernelModule, x: Tensor, g: Tensor, settings: OptimizerConfig) -> float:
    """How far a small step moves the output, relative to a zero layer of the host's geometry under the same step
    and scaled to the fan-in of the kernel's last operation (under Adam and SGD alike a step moves an output by its
    fan-in). Trains the kernel."""
    small = settings.model_copy(update={"lr": settings.lr * SMALL_STEP})
    reference = _reference(kernel)
    moved = _rms(_step(kernel, x, g, small, count=1).delta)
    host_moved = _rms(_step(reference, x, g, small, count=1).delta)
    wider = max(1.0, _fan_in(kernel) / _fan_in(reference))
    return moved / (wider * host_moved) if host_moved > 0.0 else math.inf


def _fan_in(module: nn.Module) -> int:
    weights = [p for p in module.parameters() if p.dim() > 1]
    return weights[-1][0].numel() if weights else 1


def _step_failures(kernel: KernelModule, steps: _Steps, relative_drift: float) -> list[str]:
    failures = []
    if steps.not_finite:
        failures.append(f"finite: not finite within two steps: {', '.join(steps.not_finite)}")
    missing = [name for name, _ in kernel.named_parameters() if name not in steps.with_gradient]
    if missing:
        failures.append(f"gradient: none within two steps for {', '.join(missing)}")
    if not relative_drift <= DRIFT_LIMIT:
        failures.append(
            f"drift: a small step moves the output {relative_drift:.3g} times as far as the host's own weights would, "
            f"the bound is {DRIFT_LIMIT:g}"
        )
    return failures


def _cost_failures(kernel: KernelModule, flops: int) -> list[str]:
    typed = check_graph(kernel.manifest.graph)
    counted = sum(parameter.numel() for parameter in kernel.parameters())
    failures = []
    if counted != typed.parameter_count:
        failures.append(f"cost: {counted} parameters, the IR says {typed.parameter_count}")
    if flops != typed.flops_per_sample:
        failures.append(f"cost: {flops} floating point operations a sample, the IR says {typed.flops_per_sample}")
    return failures


def _flops(module: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    return int(counter.get_total_flops())


def _median_us(call: Callable[[], Tensor]) -> float:
    with torch.no_grad():
        call()
        times = []
        for _ in range(TIMED_CALLS):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return 1e6 * sorted(times)[len(times) // 2]


def _largest(tensor: Tensor) -> float:
    largest = float(tensor.double().abs().max())
    return largest if math.isfinite(largest) else math.inf


def _rms(tensor: Tensor) -> float:
    return math.sqrt(float(tensor.double().square().mean()))


def _scale(tensor: Tensor) -> float:
    scale = _rms(tensor)
    return scale if math.isfinite(scale) and scale > 0.0 else 1.0


def _finite(value: float) -> float:
    """A contract holds no infinity: the largest float stands for it, and the failure names what happened."""
    return value if math.isfinite(value) else float(torch.finfo(torch.float64).max)
