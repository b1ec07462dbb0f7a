"""The fault barrier around a kernel on probation. The unit of retry is the step; nothing is captured without a kernel.

A forward that is tried again has moved generators and buffers, and an error may come from the backward: so the step is
put back to its beginning, and taken without the kernel. Whose fault it was is found by trying that first: a step that
fails without the kernel too is the task's own failure. What is decided is recorded before it is executed, and executed
at the boundary of the step as any fact is, so that a resumed or reproduced run does the same.

Measured on a multilayer perceptron of 12-8-8-3: a guarded step takes a fifth longer; a step with nothing on probation
takes what it took.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from time import monotonic

import torch
from torch import nn

from esper.contracts.enums import FactKind
from esper.contracts.operational import Fact
from esper.contracts.operational import Metrics
from esper.errors import last_line
from esper.runtime.failpoints import hit
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.wrapping.morphable import sites_of
from esper.runtime.kasmina.wrapping.undisturbed import captured_random_state
from esper.runtime.tolaria.live import surgery
from esper.runtime.tolaria.live.boundary import pass_boundary
from esper.runtime.tolaria.live.epoch_end import measure_epoch
from esper.runtime.tolaria.live.kernel_faults.quarantine import marked
from esper.runtime.tolaria.live.kernel_faults.strikes import breaker_after_strike
from esper.runtime.tolaria.live.kernel_faults.strikes import breaker_fact
from esper.runtime.tolaria.live.kernel_faults.strikes import strike_fact
from esper.runtime.tolaria.live.live_run import LiveRun
from esper.runtime.tolaria.live.run_state import HeldGraft
from esper.runtime.tolaria.live.shared_run import Phase
from esper.runtime.tolaria.live.shared_run import SharedRun
from esper.runtime.tolaria.live.task_failure import failed
from esper.runtime.tolaria.trainee import NotFinite

MOST_WORDS = 200
"""Characters of an error that go into a fact."""


@dataclass(frozen=True)
class _Fault:
    """What a step or an evaluation with the kernel raised, without the frames that would keep its tensors alive."""

    error: Exception

    @property
    def words(self) -> str:
        return last_line(self.error)[:MOST_WORDS]

    @property
    def out_of_memory(self) -> bool:
        return isinstance(self.error, torch.OutOfMemoryError | MemoryError)


class _StepStart:
    """Random generators and buffers before a step."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._restore_random_state = captured_random_state()
        self._buffers = [
            (module, name, buffer, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def restore(self) -> None:
        """Everything that a forward and a backward move is as it was; there are no gradients."""
        self._restore_random_state()
        for parameter in self._model.parameters():
            parameter.grad = None
        with torch.no_grad():
            for module, name, buffer, content in self._buffers:
                module._buffers[name] = buffer
                buffer.copy_(content)
        for module in sites_of(self._model).values():
            for tap in state_of(module).outbound:
                tap.clear()


def take_step(shared: SharedRun, phase: Phase) -> int:
    """Take the next step; returns the rows of its batch. Raises `RunFailed` (ESP-601) when the task itself fails."""
    run = shared.run
    held = run.state.held
    if held is None or held.struck_at == run.step:
        began = monotonic()
        rows = _unguarded(shared)
        if held is None and shared.pace is not None:
            shared.pace.without(monotonic() - began)
        return rows
    first = run.step == held.fact.apply_step
    with marked(shared, held.fact) if first else nullcontext():
        if first:
            hit("kernel.first_step")
        start = _StepStart(run.trainee.model)
        began = monotonic()
        taken = _attempt(run)
    if not isinstance(taken, _Fault):
        _watch_pace(shared, held.fact, monotonic() - began)
        return taken
    start.restore()
    if taken.out_of_memory and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    own = _failure_without_kernel(run, held.fact)
    start.restore()
    if own is not None:
        return _own_failure(shared, taken.error, own)
    shared.record(strike_fact(run, held.fact, taken.words))
    if taken.out_of_memory:
        shared.record(breaker_after_strike(run, held.fact, f"breaker: out of memory with its kernel: {taken.words}"))
    pass_boundary(shared, phase)
    return take_step(shared, phase)


def measure(shared: SharedRun, phase: Phase) -> tuple[Metrics, HeldGraft | None]:
    """At the end of an epoch: its metrics, and the graft on probation as `LiveRun.look` has it.

    A kernel on probation without which the evaluation does not fail is removed. Raises `RunFailed` (ESP-601) when a
    metric is no finite number, and what the task raises.
    """
    run = shared.run
    if run.state.held is not None:
        _execute_known_breaker(shared, run.state.held.fact)
    held = run.state.held
    if held is None:
        return measure_epoch(run.trainee, lambda: phase("validating")), run.look()
    cancelled = False

    def tick() -> None:
        nonlocal cancelled
        cancelled = True
        phase("validating")
        cancelled = False

    before = run.state
    try:
        metrics = measure_epoch(run.trainee, tick)
        looked = run.look()
        _require_finite_look(looked)
        return metrics, looked
    except Exception as error:
        if cancelled:
            raise
        fault = _Fault(error.with_traceback(None))
    run.state = before
    with surgery.asleep(run.trainee.model, *surgery.place_of(held.fact)):
        metrics = measure_epoch(run.trainee, lambda: phase("validating"))
    reason = f"breaker: evaluation fails with its kernel: {fault.words}"
    opened = shared.record(breaker_fact(run, held.fact, reason))
    if opened.apply_step == run.step:
        run.execute(opened)
    return metrics, run.state.held


def _execute_known_breaker(shared: SharedRun, graft: Fact) -> None:
    """A breaker that opened at this very step is executed before anything is measured, as when it opened."""
    with shared.turn.condition:
        known = shared.book.find(graft.adaptation_id, FactKind.BREAKER)
    if known is not None and known.apply_step == shared.run.step:
        shared.run.execute(known)


def _require_finite_look(held: HeldGraft | None) -> None:
    losses = held.looks[-1] if held is not None and held.looks else ()
    if not all(math.isfinite(loss) for loss in losses):
        raise NotFinite("a loss on the judge slice is not finite")


def _attempt(run: LiveRun) -> "int | _Fault":
    try:
        return run.take_step(checked=True)
    except Exception as error:
        return _Fault(error.with_traceback(None))


def _failure_without_kernel(run: LiveRun, graft: Fact) -> Exception | None:
    """What the same step raises when the kernel is not executed; nothing is changed by it but what `_StepStart` has."""
    try:
        with surgery.asleep(run.trainee.model, *surgery.place_of(graft)):
            run.trainee.rehearse()
    except Exception as error:
        return error
    return None


def _own_failure(shared: SharedRun, with_kernel: Exception, own: Exception) -> int:
    """The task fails with and without the kernel: what happens is what would happen without a guard."""
    if isinstance(with_kernel, NotFinite):
        return _unguarded(shared)
    raise failed(shared, f"step {shared.run.step}", with_kernel if isinstance(own, NotFinite) else own)


def _unguarded(shared: SharedRun) -> int:
    try:
        return shared.run.take_step()
    except Exception as error:
        raise failed(shared, f"step {shared.run.step}", error) from error


def _watch_pace(shared: SharedRun, graft: Fact, seconds: float) -> None:
    if shared.pace is None:
        return
    slow = shared.pace.beside(graft.adaptation_id, seconds)
    if slow is not None:
        # Executed at the boundary that follows.
        shared.record(breaker_fact(shared.run, graft, slow))
