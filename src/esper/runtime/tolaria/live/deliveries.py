"""Orders that reach a session while it trains: a kernel, the news that there will be none, a person's cull.

They run beside the training thread, fetch and verify and build there, and change nothing but the book of facts: what
they record is executed by the thread that trains, at its step.
"""

import logging
from dataclasses import dataclass

from esper.contracts.enums import FactKind
from esper.contracts.enums import SeedState
from esper.contracts.operational import Fact
from esper.contracts.operational import KernelDelivery
from esper.contracts.operational import ScheduledAdaptation
from esper.contracts.orders import InstallResult
from esper.errors import GrowthError
from esper.errors import IntegrityError
from esper.errors import SiteError
from esper.runtime.failpoints import hit
from esper.runtime.kasmina.lifecycle import REMOVABLE
from esper.runtime.tezzeret.build import KernelModule
from esper.runtime.tolaria.live.compilation import compile_kernel
from esper.runtime.tolaria.live.compilation import wants_compiled
from esper.runtime.tolaria.live.delivery import graft_fact
from esper.runtime.tolaria.live.delivery import missed_fact
from esper.runtime.tolaria.live.delivery import prepare_kernel
from esper.runtime.tolaria.live.shared_run import SharedRun
from esper.runtime.tolaria.live.surgery import seed_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Refusal:
    reason: str
    stale: bool = False


def install(shared: SharedRun, delivery: KernelDelivery) -> InstallResult:
    """Record the graft of a delivered kernel, any number of times once, with the kernel ready in memory before.

    A delivery that cannot be grafted is recorded as missed, so that training does not wait for it. Raises what the
    store raises when it cannot be reached: where that happens at the record, which may stand then, the session is over.
    """
    hit("delivery.received")
    adaptation = delivery.adaptation
    with shared.turn.condition:
        shared.turn.check()
        recorded = shared.book.find(adaptation.adaptation_id, FactKind.QUARANTINE)
        recorded = recorded or shared.book.delivery(adaptation.adaptation_id)
    if recorded is not None:
        return _result(recorded)
    kernel: KernelModule | None = None
    refusal: _Refusal | None = None
    try:
        if delivery.kernel in shared.quarantined:
            raise GrowthError("ESP-437", f"kernel {delivery.kernel[:19]} is in quarantine: it ended its process twice")
        kernel = prepare_kernel(delivery, shared.store, shared.run.trainee.plan.device)
        _compile(shared, kernel)
    except (IntegrityError, GrowthError) as error:
        refusal = _Refusal(f"rejected: {error.message}")
    hit("delivery.fetched")
    with shared.turn.condition:
        recorded = shared.book.delivery(adaptation.adaptation_id)
        if recorded is not None:
            return _result(recorded)
        step = _apply_step(shared, adaptation)
        refusal = refusal or _refusal(shared, delivery, step)
        if kernel is not None and refusal is None:
            shared.prepared[adaptation.adaptation_id] = kernel
        shared.book.reserve(adaptation.adaptation_id, step, graft=refusal is None)
    hit("delivery.reserved")
    run = shared.run
    try:
        if refusal is None:
            recorded = shared.record(graft_fact(run.run_id, delivery, step, run.trainee.plan))
        else:
            recorded = shared.record(missed_fact(run.run_id, adaptation, step, refusal.reason))
    finally:
        with shared.turn.condition:
            shared.book.release(adaptation.adaptation_id)
            shared.turn.condition.notify_all()
    hit("delivery.recorded")
    if refusal is not None and refusal.stale:
        return InstallResult(adaptation_id=adaptation.adaptation_id, accepted=False, fact=None, reason=refusal.reason)
    return _result(recorded)


def abandon(shared: SharedRun, adaptation: ScheduledAdaptation, reason: str) -> InstallResult:
    """There will be no kernel: training does not wait for it. A delivery that was recorded before stands."""
    with shared.turn.condition:
        shared.turn.check()
        recorded = shared.book.delivery(adaptation.adaptation_id)
        if recorded is not None:
            return _result(recorded)
        step = _apply_step(shared, adaptation)
        shared.book.reserve(adaptation.adaptation_id, step)
    try:
        recorded = shared.record(missed_fact(shared.run.run_id, adaptation, step, reason))
    finally:
        with shared.turn.condition:
            shared.book.release(adaptation.adaptation_id)
            shared.turn.condition.notify_all()
    return _result(recorded)


def remove(shared: SharedRun, adaptation_id: str) -> InstallResult:
    """A person's cull of a block, on probation or kept: it begins at the first boundary that is free."""
    with shared.turn.condition:
        shared.turn.check()
        recorded = shared.book.find(adaptation_id, FactKind.REMOVE)
        if recorded is not None:
            return InstallResult(adaptation_id=adaptation_id, accepted=True, fact=recorded, reason="being removed")
        graft = shared.book.find(adaptation_id, FactKind.GRAFT)
        step = shared.chosen_step()
        reason = _cannot_remove(shared, adaptation_id, graft, step)
        if reason is not None or graft is None:
            reason = reason or "it was never grafted"
            return InstallResult(adaptation_id=adaptation_id, accepted=False, fact=None, reason=reason)
        shared.book.reserve(adaptation_id, step)
    try:
        recorded = shared.record(graft.successor(FactKind.REMOVE, step, "removed by a person"))
    finally:
        with shared.turn.condition:
            shared.book.release(adaptation_id)
            shared.turn.condition.notify_all()
    hit("remove.before_answer")
    return InstallResult(adaptation_id=adaptation_id, accepted=True, fact=recorded, reason="being removed")


def _compile(shared: SharedRun, kernel: KernelModule) -> None:
    plan = shared.run.trainee.plan
    if wants_compiled(plan.config.tezzeret, plan.device):
        limit = plan.config.tezzeret.timeout_s
        reason = compile_kernel(kernel, shared.run.graph(), plan.device, limit, lambda: None)
        if reason is not None:
            log.warning("kernel %s runs eagerly: %s", kernel.digest[:19], reason)


def _apply_step(shared: SharedRun, adaptation: ScheduledAdaptation) -> int:
    """The scheduled step if training has not left its boundary, else the first free one."""
    scheduled = adaptation.apply_step
    if scheduled is not None and scheduled > shared.passed and scheduled >= shared.run.step:
        return scheduled
    return shared.chosen_step()


def _refusal(shared: SharedRun, delivery: KernelDelivery, step: int) -> _Refusal | None:
    run, adaptation = shared.run, delivery.adaptation
    plan = run.trainee.plan
    try:
        seed = seed_of(run.trainee.model, adaptation.site, adaptation.seed)
    except SiteError as error:
        return _Refusal(f"rejected: {error.message}")
    if seed is None:
        return _Refusal(f"rejected: {adaptation.site} has no seed {adaptation.seed}")
    if seed.generation != adaptation.seed_generation:
        return _Refusal(
            f"stale: it is for generation {adaptation.seed_generation} of seed {seed.index} at {seed.site}, "
            f"which is at {seed.generation}",
            stale=True,
        )
    held, pending = run.state.held, shared.book.pending_graft(run.state)
    other = pending or (held.fact if held is not None else None)
    if other is not None:
        return _Refusal(f"conflict: {other.adaptation_id} is on probation")
    if shared.book.grafting not in (None, adaptation.adaptation_id):
        return _Refusal(f"conflict: {shared.book.grafting} is being grafted")
    if seed.state is not SeedState.DORMANT:
        return _Refusal(f"conflict: seed {seed.index} at {seed.site} is {seed.state}")
    if adaptation.apply_step is not None and step != adaptation.apply_step:
        return _Refusal(f"late: training has passed step {adaptation.apply_step}")
    if plan.judge_step(step) > plan.total_steps:
        return _Refusal(f"late: the run ends before a graft at step {step} could be judged")
    return None


def _cannot_remove(shared: SharedRun, adaptation_id: str, graft: Fact | None, step: int) -> str | None:
    run = shared.run
    if graft is None or graft.site is None or graft.seed is None:
        return "it was never grafted"
    if not run.state.has_executed(graft):
        return f"it will be grafted at step {graft.apply_step}; veto it instead"
    seed = seed_of(run.trainee.model, graft.site, graft.seed)
    if seed is None or seed.adaptation_id != adaptation_id:
        return "it is no longer in the model"
    if seed.state not in REMOVABLE:
        return f"it is {seed.state}"
    if step >= run.trainee.plan.total_steps:
        return "the run ends before it could be removed"
    return None


def _result(fact: Fact) -> InstallResult:
    accepted = fact.kind is FactKind.GRAFT
    reason = f"grafted at step {fact.apply_step}" if accepted else fact.reason or "missed"
    return InstallResult(adaptation_id=fact.adaptation_id, accepted=accepted, fact=fact, reason=reason)
