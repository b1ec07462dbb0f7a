"""The birth certificate: measured facts of one kernel, without the model that it is for.

It is measured on shipped samples (the X that the kernel reads, the gradient G at the output that it adds to), else on
seeded random ones, on private copies throughout (running statistics of a batch norm are as they were). Checks, by the
name that a failure begins with:

    birth       the delta is exactly zero, in training and in evaluation, so the graft preserves the function to the
                bit; where a normalisation stands between the zero and the output, below the bound that is stated
    backward    nor does the gradient change that passes on to the layers below
    state       nothing that the optimizer of a trained neighbour keeps, nor its next step, differs by the graft
    shape       the delta has the site's output shape and dtype
    finite      output, gradients and parameters are finite through two optimizer steps
    autocast    and in mixed precision, bfloat16 and, where the CPU has it, float16 (of sites in float32 or wider)
    gradient    every parameter gets a non-zero gradient within two steps (a zero before a ReLU never does)
    drift       a small step of the run's optimizer moves the output by no more than `DRIFT_LIMIT` times what that
                step would do through a plain layer of equal fan-in. Sound kernels move less than 5 times, a zero
                inside a normalisation 1 / sqrt(epsilon), some 300 times, until it saturates at full size
    cost        parameters and floating point operations are those of the IR
    parity      compiled and eager agree
"""

import copy
import math
import platform
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import nn

from esper.contracts.assets import Certificate
from esper.runtime.tezzeret import parity
from esper.runtime.tezzeret.artifact import KernelFiles
from esper.runtime.tezzeret.build import load_kernel
from esper.runtime.tezzeret.certifying.autocast import under_autocast
from esper.runtime.tezzeret.certifying.evidence import evidence_of
from esper.runtime.tezzeret.certifying.neighbours import disturbance
from esper.runtime.tezzeret.certifying.reference import Reference
from esper.runtime.tezzeret.certifying.reference import reference_for
from esper.runtime.tezzeret.certifying.resources import flops_per_sample
from esper.runtime.tezzeret.certifying.resources import held_bytes
from esper.runtime.tezzeret.certifying.resources import median_us
from esper.runtime.tezzeret.certifying.resources import peak_bytes_per_sample
from esper.runtime.tezzeret.certifying.steps import Given
from esper.runtime.tezzeret.certifying.steps import Stepping
from esper.runtime.tezzeret.certifying.steps import Steps
from esper.runtime.tezzeret.certifying.steps import backward
from esper.runtime.tezzeret.certifying.steps import largest
from esper.runtime.tezzeret.certifying.steps import root_mean_square
from esper.runtime.tezzeret.certifying.steps import stepping_of
from esper.runtime.tezzeret.certifying.steps import take_steps
from esper.runtime.tezzeret.ir import check_graph
from esper.runtime.tezzeret.module import TORCH_DTYPES
from esper.runtime.tezzeret.module import KernelModule
from esper.runtime.tezzeret.operations.norms import NORMS
from esper.runtime.tezzeret.operations.table import OPERATIONS
from esper.runtime.tezzeret.samples import SiteSamples
from esper.runtime.tezzeret.samples import check_samples

DRIFT_LIMIT = 30.0
SMALL_STEP = 0.01
"""The share of the learning rate at which the drift is judged: at the whole of it a jump may have saturated."""
NORM_BOUND = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2**-8, torch.bfloat16: 2**-5}
"""How far from zero, relative to the root mean square of the input, a kernel may begin with whose output comes through
a normalisation of what is normal already: its epsilon is 1e-5, the rest is rounding."""


@dataclass(frozen=True)
class Trial:
    """A kernel that is measured, a plain layer in its host's place, what both are measured on and trained by."""

    kernel: KernelModule
    reference: Reference
    x: Tensor
    g: Tensor
    stepping: Stepping

    @property
    def is_full(self) -> bool:
        """Whether the numbers are float32 or wider."""
        return self.g.element_size() > 2

    def trainable(self) -> "Trial":
        """The same in float32 where that is float16: there Adam's epsilon is zero, and it trains no layer at all."""
        if self.g.dtype is not torch.float16:
            return self
        return Trial(
            copy.deepcopy(self.kernel).float(),
            copy.deepcopy(self.reference).float(),
            self.x.float() if self.x.is_floating_point() else self.x,
            self.g.float(),
            self.stepping,
        )


def certify(
    files: KernelFiles,
    *,
    samples: SiteSamples | None,
    host: nn.Module | None = None,
    optimizer: Given = None,
    compile: bool = False,
) -> Certificate:
    """Measure a kernel in this process and say whether it may be grafted (`passed`, else `failures` by name).

    As `certify_module`, of stored bytes. Raises IntegrityError ESP-401..405 when the files are not a kernel (weights
    that are not finite are none), BlueprintError ESP-414, ESP-417 when the samples are not of its site.
    """
    with torch.device("cpu"):
        kernel = load_kernel(files, files.digest)
    return certify_module(kernel, samples=samples, host=host, optimizer=optimizer, compile=compile)


def certify_module(
    kernel: KernelModule,
    *,
    samples: SiteSamples | None,
    host: nn.Module | None = None,
    optimizer: Given = None,
    compile: bool = False,
) -> Certificate:
    """Measure a kernel that is on the CPU; it stays as it is, and the global random generators are not drawn from.

    `first_step_drift` is the root mean square of the delta after one step, relative to that of the host's output;
    without `host` the scale is that of the layer's input, which a variance-preserving layer keeps (1 for ids).
    `optimizer` is the run's configuration (its peak learning rate is used; default: Esper's own), or the optimizer
    itself or several, of which the class and the settings of the first group are taken. `host` is called without
    gradients.
    """
    site = kernel.manifest.site
    with torch.enable_grad(), torch.device("cpu"):
        if samples is not None:
            check_samples(samples, site)
        evidence = evidence_of(site, samples, int(kernel.digest[-12:], 16))
        x, g = evidence.x, evidence.g
        reference = reference_for(site)
        stepping = stepping_of(optimizer)
        measured = host if host is not None else reference
        facts: dict[str, object] = {
            "kernel": kernel.digest,
            "parameters_total": len(list(kernel.parameters())),
            "parameter_count": sum(p.numel() for p in kernel.parameters()),
            "parameter_bytes": held_bytes(kernel),
            "optimizer": stepping.name,
            "reference": "host" if host is not None else reference.name,
            "torch_version": torch.__version__,
            "forge": f"{platform.node()}/{platform.machine()}",
        }
        host_flops, host_us = flops_per_sample(copy.deepcopy(measured), x), median_us(copy.deepcopy(measured), x)
        facts |= {"host_flops_per_sample": host_flops, "host_forward_us": host_us}
        scale = _scale(copy.deepcopy(measured)(x).detach() if host is not None else x)
        failures = _shape_failures(kernel, x, g)
        if failures:
            facts |= _UNMEASURED
        else:
            trial = Trial(kernel, reference, x, g, stepping)
            facts |= _born(trial, failures) | _trained(trial, scale, failures) | _costs(trial, failures)
            if compile:
                facts |= _compiled(kernel, x, g, failures)
    return Certificate.model_validate(facts | {"passed": not failures, "failures": tuple(failures)})


_UNMEASURED: dict[str, object] = {
    "birth_difference": float(torch.finfo(torch.float64).max),
    "first_step_drift": 0.0,
    "parameters_with_gradient": 0,
    "flops_per_sample": 0,
    "forward_us": 0.0,
    "compiled": "off",
}
"""What a certificate says of a kernel that does not even fit its site."""


def _born(trial: Trial, failures: list[str]) -> dict[str, object]:
    """What the graft itself does."""
    birth, bound = _birth(trial.kernel, trial.x), birth_bound(trial.kernel, trial.x)
    if not birth <= bound:
        stated = "not zero but" if bound == 0.0 else f"above its bound of {bound:.3g}:"
        failures.append(f"birth: the delta is {stated} up to {birth:.3g}")
    wide = trial.trainable()
    reads = trial.kernel.manifest.site.reads
    disturbed = disturbance(wide.kernel, wide.reference, reads, wide.x, wide.g, trial.stepping)
    if bound == 0.0 and disturbed.gradient != 0.0:
        failures.append(f"backward: the gradient to the layers below changes by {disturbed.gradient:.3g} of itself")
    if bound == 0.0 and disturbed.touched:
        failures.append(f"state: the graft changes a trained neighbour's {', '.join(disturbed.touched)}")
    return {
        "birth_difference": _finite(birth),
        "birth_bound": bound,
        "backward_difference": _finite(disturbed.gradient),
        "neighbour_state_kept": not disturbed.touched,
    }


def _trained(trial: Trial, scale: float, failures: list[str]) -> dict[str, object]:
    """What the first optimizer steps do."""
    wide = trial.trainable()
    trained = copy.deepcopy(wide.kernel)
    steps = take_steps(trained, wide.x, wide.g, trial.stepping, count=2)
    broken = {*steps.not_finite, *backward(copy.deepcopy(trained).to(trial.g.dtype), trial.x, trial.g)}
    drift = _relative_drift(wide)
    failures += _step_failures(wide.kernel, steps, broken, drift)
    mixed = under_autocast(trained, wide.reference, wide.x, wide.g) if trial.is_full and not broken else {}
    failures += [f"autocast: {name} is not finite" for name, outcome in mixed.items() if outcome == "not finite"]
    return {
        "first_step_drift": _finite(root_mean_square(steps.first) / scale),
        "first_step_change": _finite(largest(steps.first)),
        "parameters_with_gradient": len(steps.with_gradient),
        "autocast": mixed,
        "optimizer_bytes": steps.state_bytes,
    }


def _costs(trial: Trial, failures: list[str]) -> dict[str, object]:
    kernel, x, g = trial.kernel, trial.x, trial.g
    flops = flops_per_sample(copy.deepcopy(kernel), x)
    failures += cost_failures(kernel, flops)
    return {
        "flops_per_sample": flops,
        "peak_bytes_per_sample": peak_bytes_per_sample(copy.deepcopy(kernel), x, g),
        "forward_us": median_us(copy.deepcopy(kernel), x),
        "compiled": "off",
    }


def _compiled(kernel: KernelModule, x: Tensor, g: Tensor, failures: list[str]) -> dict[str, object]:
    rows = min(x.shape[0], parity.ROWS)
    compared = parity.compare(copy.deepcopy(kernel), x[:rows], g[:rows])
    if not compared.agrees:
        failures.append(f"parity: compiled and eager differ by {compared.difference:.3g}")
    difference = compared.difference
    return {
        "compiled": compared.outcome,
        "compiled_difference": None if difference is None else _finite(difference),
    }


def _shape_failures(kernel: KernelModule, x: Tensor, g: Tensor) -> list[str]:
    site = kernel.manifest.site
    try:
        delta = copy.deepcopy(kernel)(x).detach()
    except RuntimeError as error:
        return [f"shape: the kernel cannot read (rows, *{site.input_shape}): {str(error).splitlines()[0]}"]
    if delta.shape != g.shape or delta.dtype != TORCH_DTYPES[site.dtype]:
        return [
            f"shape: the delta is {tuple(delta.shape)} {delta.dtype}, the site needs (rows, *{site.output_shape}) "
            f"{site.dtype}"
        ]
    return []


def _birth(kernel: KernelModule, x: Tensor) -> float:
    # Not finite counts as a difference: NaN is not zero.
    with torch.no_grad():
        return max(largest(copy.deepcopy(kernel).train(mode)(x)) for mode in (True, False))


def birth_bound(kernel: KernelModule, x: Tensor) -> float:
    """How far from zero the delta may begin: not at all, unless a normalisation reaches the output and no operation
    whose parameters are all zero stands between; then `NORM_BOUND` times the root mean square of the input."""
    nodes = {node.id: node for node in check_graph(kernel.manifest.graph).nodes}
    waiting, seen = list(kernel.manifest.graph.outputs), set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in nodes:
            continue
        seen.add(name)
        if nodes[name].op in NORMS:
            return NORM_BOUND[TORCH_DTYPES[kernel.manifest.site.dtype]] * _scale(x)
        parameters = list(kernel.get_submodule(name).parameters())
        if not parameters or any(bool(parameter.detach().any()) for parameter in parameters):
            waiting += nodes[name].inputs
    return 0.0


def _relative_drift(trial: Trial) -> float:
    """How far a small step moves the output, relative to a zero layer in the host's place under the same step and
    scaled to the fan-in of the kernel's last operation (under Adam and SGD alike a step moves an output by its
    fan-in)."""
    x, g, stepping = trial.x, trial.g, trial.stepping
    newborn, host = copy.deepcopy(trial.kernel), copy.deepcopy(trial.reference)
    before = newborn(x).detach()
    moved = root_mean_square(take_steps(newborn, x, g, stepping, count=1, factor=SMALL_STEP).first - before)
    host_moved = root_mean_square(take_steps(host, x, g, stepping, count=1, factor=SMALL_STEP).first)
    if moved == 0.0:
        return 0.0
    wider = max(1.0, _fan_in(trial.kernel) / trial.reference.fan_in)
    return moved / (wider * host_moved) if host_moved > 0.0 else math.inf


def _fan_in(kernel: KernelModule) -> int:
    trainable = [node for node in check_graph(kernel.manifest.graph).nodes if node.tensors()]
    if not trainable:
        return 1
    fan_in = OPERATIONS[trainable[-1].op].fan_in
    return max(fan_in(shape) for shape in trainable[-1].tensors().values())


def _step_failures(kernel: KernelModule, steps: Steps, broken: set[str], relative_drift: float) -> list[str]:
    failures = []
    if broken:
        failures.append(f"finite: not finite within two steps: {', '.join(sorted(broken))}")
    missing = [name for name, _ in kernel.named_parameters() if name not in steps.with_gradient]
    if missing:
        failures.append(f"gradient: none within two steps for {', '.join(missing)}")
    if not relative_drift <= DRIFT_LIMIT:
        failures.append(
            f"drift: a small step moves the output {relative_drift:.3g} times as far as the host's own weights would, "
            f"the bound is {DRIFT_LIMIT:g}"
        )
    return failures


def cost_failures(kernel: KernelModule, flops: int) -> list[str]:
    """Where parameters, or the `flops` that were counted for one sample, are not what the IR says."""
    typed = check_graph(kernel.manifest.graph)
    counted = sum(parameter.numel() for parameter in kernel.parameters())
    failures = []
    if counted != typed.parameter_count:
        failures.append(f"cost: {counted} parameters, the IR says {typed.parameter_count}")
    if flops != typed.flops_per_sample:
        failures.append(f"cost: {flops} floating point operations a sample, the IR says {typed.flops_per_sample}")
    return failures


def _scale(tensor: Tensor) -> float:
    scale = root_mean_square(tensor) if tensor.is_floating_point() else 1.0
    return scale if math.isfinite(scale) and scale > 0.0 else 1.0


def _finite(value: float) -> float:
    """A contract holds no infinity: the largest float stands for it, and the failure names what happened."""
    return value if math.isfinite(value) else float(torch.finfo(torch.float64).max)
