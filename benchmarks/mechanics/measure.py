"""One case, measured: a kernel grafted into a tiny model that has been trained for a while, and beside it a twin, a
copy of model and optimizers from just before the graft, trained on the same batch.
"""

import copy
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.mechanics.cases import LIBRARY
from benchmarks.mechanics.cases import Case
from torch import Tensor
from torch import nn
from torch.optim import Optimizer

import esper
from esper.errors import BlueprintError
from esper.errors import GrowthError
from esper.runtime.kasmina.growing.fitting import host_weights
from esper.runtime.kasmina.growing.fitting import site_contract
from esper.runtime.kasmina.probe import probe
from esper.runtime.tezzeret.artifact import KernelFiles
from esper.runtime.tezzeret.artifact import verify
from esper.runtime.tezzeret.blueprints.registry import resolve_hyperparameters
from esper.runtime.tezzeret.build import build_kernel
from esper.runtime.tezzeret.certify import certify
from esper.runtime.tezzeret.certifying.steps import root_mean_square
from esper.runtime.tezzeret.samples import samples_for

STEPS_BEFORE = 3
STEPS_AFTER = 5
FOLD_BOUND = 1e-5
COMPILED_BOUND = 1e-4
NOT_PRESERVED = "certificate"
"""What stands for a code where the birth certificate refused a kernel that says itself that it is not zero."""


@dataclass(frozen=True)
class Outcome:
    """What one case showed. Differences are largest absolute ones, relative to the largest value where it says so.

    `birth`: of the output at the graft, in training and evaluation. `drift`: root mean square change of the output
    by the newborn's first step, relative. `carry`: of the old parameters and of all that the optimizer keeps of
    them, after one step with the graft against one without. `reset`: how far that step of the old parameters would
    be off if their optimizer had been made anew, relative to the step. `round_trip`: of the output after save and
    load. `fold`: of the output after fossilize and unwrap, relative; `folded`: no block is left. `compiled`: of
    output and gradients against eager, relative. None where it was not measured.
    """

    case: Case
    refused: str | None = None
    birth: float | None = None
    drift: float | None = None
    with_gradient: int = 0
    parameters: int = 0
    carry: float | None = None
    reset: float | None = None
    round_trip: float | None = None
    fold: float | None = None
    folded: bool | None = None
    compiled: float | None = None
    leaving: str | None = None
    """What went wrong with fossilize and unwrap, or with the optimizer after them."""
    certificate: tuple[str, ...] = ()
    """What the birth certificate of the kernel says against it."""

    @property
    def findings(self) -> tuple[str, ...]:
        """What is not as it must be."""
        if self.refused is not None:
            return () if self.is_expected else (f"refused: {self.refused}",)
        found = [f"certificate {failure}" for failure in self.certificate]
        for name, value, bound in (
            ("birth", self.birth, 0.0),
            ("carry", self.carry, 0.0),
            ("drift", self.drift, math.inf),
            ("round trip", self.round_trip, 0.0),
            ("fold", self.fold, FOLD_BOUND),
            ("compiled", self.compiled, COMPILED_BOUND),
        ):
            if value is not None and (not value <= bound or math.isnan(value) or value == math.inf):
                found.append(f"{name} {value:.3g}")
        if self.with_gradient != self.parameters:
            found.append(f"gradients for {self.with_gradient} of {self.parameters} tensors within two steps")
        if self.leaving is not None:
            found.append(self.leaving)
        return tuple(found)

    @property
    def is_expected(self) -> bool:
        """Whether a refusal is the right answer: to an optimizer that cannot grow, to an initialiser that lacks what
        it needs or does not preserve the function and says so."""
        assert self.refused is not None
        code = self.refused.partition(" ")[0]
        return code in ("ESP-428", NOT_PRESERVED) or (code == "ESP-433" and not self.case.optimizer.steps_alone)


def measure(case: Case, *, compiled: bool = False) -> Outcome:
    """Run one case that fits. What the engine refuses by name is an outcome; any other error is raised."""
    host, x = case.host, case.host.batch()
    model = host.wrapped()
    optimizers = case.optimizer.make(model)
    if case.optimizer.steps_alone:
        for _ in range(STEPS_BEFORE):
            _step(model, x, optimizers)
    before = copy.deepcopy((model, optimizers))
    certificate: tuple[str, ...] = ()
    try:
        if case.initialiser == LIBRARY:
            graft = esper.graft(model, host.site, case.blueprint, optimizer=_one_or_all(optimizers))
        else:
            files = kernel_files(model, case, x)
            preserves = verify(files, files.digest).preserves
            certificate = certify(files, samples=None, optimizer=optimizers).failures
            if not preserves:
                told = next((failure for failure in certificate if failure.startswith("birth")), None)
                return Outcome(case, refused=f"{NOT_PRESERVED} {told}" if told else "ESP-000 passed its certificate")
            graft = esper.graft(model, host.site, case.blueprint, optimizer=_one_or_all(optimizers), kernel=files)
    except (GrowthError, BlueprintError) as refusal:
        return Outcome(case, refused=f"{refusal.code} {refusal.message}")
    twin, twin_optimizers = copy.deepcopy(before)
    birth = max(
        _difference(output_of(copy.deepcopy(model), x, mode), output_of(copy.deepcopy(twin), x, mode))
        for mode in (True, False)
    )
    names = {name: parameter for name, parameter in model.named_parameters() if name in graft.parameter_names}
    if not case.optimizer.steps_alone:
        return Outcome(case, birth=birth, parameters=len(names), certificate=certificate)
    reached = _step(model, x, optimizers, names)
    _step(twin, x, twin_optimizers)
    carry = _disturbance(twin, twin_optimizers, model, optimizers)
    reset = _reset(before, twin, x, case)
    with torch.no_grad():
        alone = output_of(copy.deepcopy(twin), x, False)
        drift = root_mean_square(output_of(copy.deepcopy(model), x, False) - alone) / (root_mean_square(alone) or 1.0)
    reached |= _step(model, x, optimizers, names)
    for _ in range(STEPS_AFTER):
        _step(model, x, optimizers)
    fold, folded, leaving = _left(model, optimizers, x)
    return Outcome(
        case,
        birth=birth,
        drift=drift,
        with_gradient=len(reached),
        parameters=len(names),
        carry=carry,
        reset=reset,
        round_trip=_round_trip(model, case, x),
        fold=fold,
        folded=folded,
        leaving=leaving,
        compiled=compiled_difference(model, x) if compiled else None,
        certificate=certificate,
    )


def kernel_files(model: nn.Module, case: Case, x: Tensor) -> KernelFiles:
    """A kernel whose first weights are those of the case's initialiser, told of the model's own samples and weights.
    Raises BlueprintError ESP-428 where the initialiser has no use for that."""
    contract = site_contract(model, case.host.site, case.blueprint)
    samples = samples_for(contract, probe(model, lambda: _loss(model(x))).samples)
    resolved = resolve_hyperparameters(case.blueprint, contract, {})
    own = contract.attributes.get("pair_activation")
    steep = case.initialiser == "gradmax" and "activation" in resolved
    activation = "gelu" if steep else None
    if isinstance(own, str) and "activation" in resolved:
        activation = own
    return build_kernel(
        case.blueprint,
        contract,
        {} if activation is None else {"activation": activation},
        seed=0,
        samples=samples,
        max_parameters=10**6,
        initialiser=case.initialiser,
        host=host_weights(model.get_submodule(contract.site), model.get_submodule(contract.output_site)),
    )


def _one_or_all(optimizers: tuple[Optimizer, ...]) -> Any:
    return optimizers[0] if len(optimizers) == 1 else list(optimizers)


def output_of(model: nn.Module, x: Tensor, training: bool) -> Tensor:
    """The output without gradients; running statistics of the model move."""
    with torch.no_grad():
        output: Tensor = model.train(training)(x)
    return output


def compiled_difference(model: nn.Module, x: Tensor) -> float:
    """Largest difference of output and gradients between `torch.compile` and eager, relative to the largest output
    and the largest gradient of all."""
    # Compiled code is kept by the code of a class's forward, which many models here share: eight and no more.
    torch.compiler.reset()
    eager, gradients = _values(copy.deepcopy(model), x, compile=False)
    compiled, compiled_gradients = _values(copy.deepcopy(model), x, compile=True)
    apart = max(_difference(a, b) for a, b in zip(gradients, compiled_gradients, strict=True))
    return max(_difference(eager, compiled) / _largest(eager), apart / max(_largest(one) for one in gradients))


def _values(model: nn.Module, x: Tensor, *, compile: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    called: Any = torch.compile(model, fullgraph=True) if compile else model
    output = called.train()(x)
    gradients = torch.autograd.grad(_loss(output), list(model.parameters()))
    return output.detach(), gradients


def _loss(output: Tensor) -> Tensor:
    """A loss whose gradient differs from place to place and depends on the output."""
    target = torch.linspace(-1.0, 1.0, output.numel()).reshape(output.shape)
    return (output - target).square().mean()


def _step(
    model: nn.Module, x: Tensor, optimizers: Sequence[Optimizer], watched: dict[str, nn.Parameter] | None = None
) -> set[str]:
    """One training step; gives the names of the `watched` parameters that had a gradient which is not all zero."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    _loss(model.train()(x)).backward()
    reached = {n for n, p in (watched or {}).items() if p.grad is not None and bool(p.grad.any())}
    for optimizer in optimizers:
        optimizer.step()
    return reached


def _disturbance(
    twin: nn.Module, twin_optimizers: Sequence[Optimizer], model: nn.Module, optimizers: Sequence[Optimizer]
) -> float:
    """The largest difference in what the twin has: its parameters, its buffers, its optimizers' state."""
    mine, found = dict(model.named_parameters()), 0.0
    for name, parameter in twin.named_parameters():
        found = max(found, _difference(parameter.detach(), mine[name].detach()))
        kept = {k: v for one in twin_optimizers for k, v in one.state.get(parameter, {}).items()}
        now = {k: v for one in optimizers for k, v in one.state.get(mine[name], {}).items()}
        if kept.keys() != now.keys():
            return math.inf
        for key, value in kept.items():
            found = max(found, _difference(torch.as_tensor(value), torch.as_tensor(now[key])))
    buffers = dict(model.named_buffers())
    return max([found, *(_difference(buffer, buffers[name]) for name, buffer in twin.named_buffers())])


def _reset(before: tuple[nn.Module, tuple[Optimizer, ...]], carried: nn.Module, x: Tensor, case: Case) -> float:
    start, _ = copy.deepcopy(before)
    begun = [parameter.detach().clone() for parameter in start.parameters()]
    _step(start, x, case.optimizer.make(start))
    carry = torch.cat([(p.detach() - b).flatten() for p, b in zip(carried.parameters(), begun, strict=True)])
    reset = torch.cat([(p.detach() - b).flatten() for p, b in zip(start.parameters(), begun, strict=True)])
    return float((carry - reset).norm() / carry.norm()) if bool(carry.any()) else 0.0


def _round_trip(model: nn.Module, case: Case, x: Tensor) -> float:
    with tempfile.TemporaryDirectory(prefix="esper-mechanics-") as folder:
        esper.save(model, folder)
        loaded = esper.load(folder, case.host.model())
    if esper.weights_digest(loaded) != esper.weights_digest(model):
        return math.inf
    return max(
        _difference(output_of(copy.deepcopy(model), x, mode), output_of(copy.deepcopy(loaded), x, mode))
        for mode in (True, False)
    )


def _left(
    model: nn.Module, optimizers: tuple[Optimizer, ...], x: Tensor
) -> tuple[float | None, bool | None, str | None]:
    """Fossilize and unwrap a copy: (fold error, whether no block is left, what went wrong)."""
    model, optimizers = copy.deepcopy((model, optimizers))
    grown = output_of(model, x, False)
    try:
        esper.fossilize(model, optimizer=_one_or_all(optimizers))
        plain = esper.unwrap(model, optimizer=_one_or_all(optimizers))
    except GrowthError as refusal:
        return None, None, f"unwrap refused: {refusal.code} {refusal.message}"
    error = _difference(output_of(plain, x, False), grown) / (_largest(grown) or 1.0)
    return error, not any("kasmina" in name for name in plain.state_dict()), _optimizer_fault(plain, optimizers, x)


def _optimizer_fault(model: nn.Module, optimizers: tuple[Optimizer, ...], x: Tensor) -> str | None:
    """Why one cannot train on with a model and its optimizers; None where a step works."""
    trained = [p for one in optimizers for group in one.param_groups for p in group["params"]]
    has = {id(p) for p in model.parameters()}
    if len({id(p) for p in trained}) != len(trained):
        return "a parameter is twice in the optimizer after unwrap"
    if {id(p) for p in trained} != has:
        return "the optimizer does not hold exactly the model's parameters after unwrap"
    if any(id(p) not in has for one in optimizers for p in one.state):
        return "the optimizer keeps state of a parameter that is gone"
    _step(model, x, optimizers)
    finite = all(bool(p.detach().isfinite().all()) for p in model.parameters())
    return None if finite else "the step after unwrap is not finite"


def _difference(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape or one.dtype != other.dtype:
        return math.inf
    if torch.equal(one, other):
        return 0.0
    value = _largest(one.double() - other.double())
    return math.inf if math.isnan(value) else value


def _largest(tensor: Tensor) -> float:
    return float(tensor.detach().double().abs().max()) if tensor.numel() else 0.0
