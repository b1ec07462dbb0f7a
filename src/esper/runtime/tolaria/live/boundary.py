"""What happens between two steps: the facts of this step by `seq`, then a checkpoint that was asked for."""

from time import monotonic

from esper.contracts.enums import FactKind
from esper.contracts.operational import Fact
from esper.contracts.operational import JudgeReport
from esper.runtime.failpoints import hit
from esper.runtime.tolaria.live.delivery import missed_fact
from esper.runtime.tolaria.live.delivery import prepare_kernel
from esper.runtime.tolaria.live.facts import Expected
from esper.runtime.tolaria.live.kernel_faults.quarantine import is_left_out
from esper.runtime.tolaria.live.kernel_faults.quarantine import marked
from esper.runtime.tolaria.live.kernel_faults.strikes import opened_breaker
from esper.runtime.tolaria.live.live_run import VERDICTS
from esper.runtime.tolaria.live.shared_run import Phase
from esper.runtime.tolaria.live.shared_run import SharedRun


def pass_boundary(shared: SharedRun, phase: Phase) -> None:
    """Execute everything that is due before the next step, and leave the boundary.

    A scheduled kernel that is not there yet is waited for, at most `tezzeret.timeout_s`; then it is missed.
    """
    run, turn = shared.run, shared.turn
    arrived: float | None = None
    while True:
        with turn.condition:
            turn.check()
            due = shared.book.due(run.step, run.state)
            if due is None:
                shared.passed = run.step
                return
            if not isinstance(due, Fact):
                now = monotonic()
                arrived = now if arrived is None else arrived
                limit = run.trainee.plan.config.tezzeret.timeout_s
                if not isinstance(due, Expected) or now - arrived < limit:
                    turn.moved()
                    turn.wait(phase, "waiting for a kernel")
                    shared.stall_seconds += monotonic() - now
                    continue
        if isinstance(due, Fact):
            _execute(shared, due, phase)
        else:
            reason = f"no kernel after {limit:g} s at its apply step"
            shared.record(missed_fact(run.run_id, due.adaptation, run.step, reason))


def serve_checkpoints(shared: SharedRun, phase: Phase) -> None:
    """Copy the run where training stands for those who asked, and tell them which commit to wait for: training goes
    on meanwhile. The caller has the turn."""
    with shared.turn.condition:
        requests, shared.requests = shared.requests, []
    if not requests:
        return
    try:
        shared.run.wait_for_writer(lambda commit: shared.stall_for(commit, phase))
        commit = shared.run.commit()
    except BaseException as error:
        for request in requests:
            request.set_exception(error)
        raise
    for request in requests:
        request.set_result(commit)
    with shared.turn.condition:
        shared.turn.condition.notify_all()


def judge_is_due(shared: SharedRun) -> bool:
    """Whether the graft on probation is judged exactly here and no verdict is recorded. The caller holds the lock."""
    held = shared.run.state.held
    if held is None or held.fact.judge_step != shared.run.step:
        return False
    return shared.book.find(held.fact.adaptation_id, *VERDICTS.values()) is None


def take_verdict(shared: SharedRun, phase: Phase) -> JudgeReport:
    """Judge the graft on probation, record the verdict, execute it. A verdict recorded before rules."""
    run = shared.run
    held = run.state.held
    if held is None:
        raise ValueError("no graft is on probation")

    def tick(step: int) -> None:
        shared.turn.moved()
        phase("judging")

    hit("judge.before_twin")
    twin, judgement = run.judge_held(tick, lambda commit: shared.stall_for(commit, phase))
    hit("judge.before_verdict")
    graft = held.fact
    fact = shared.book.find(graft.adaptation_id, *VERDICTS.values())
    if fact is None:
        kind = VERDICTS[judgement.verdict]
        fact = shared.record(graft.successor(kind, run.step, judgement.reason))
    return run.carry_out(fact, twin, judgement)


def _execute(shared: SharedRun, fact: Fact, phase: Phase) -> None:
    run = shared.run
    held = run.state.held
    if fact.kind is FactKind.GRAFT:
        _graft(shared, fact, phase)
    elif fact.kind in VERDICTS.values() and held is not None and held.fact.judge_step == run.step:
        take_verdict(shared, phase)
    else:
        run.execute(fact)
    opened = opened_breaker(run) if fact.kind is FactKind.STRIKE else None
    if opened is not None:
        shared.record(opened)


def _graft(shared: SharedRun, fact: Fact, phase: Phase) -> None:
    run = shared.run
    kernel = shared.prepared.pop(fact.adaptation_id, None)
    with shared.turn.condition:
        left_out = is_left_out(shared.book, fact)
    if left_out:
        run.leave_out(fact)
        return
    if kernel is None and fact.delivery is not None:
        kernel = prepare_kernel(fact.delivery, shared.store, run.trainee.plan.device)
    if kernel is None:
        raise ValueError(f"the graft of {fact.adaptation_id} carries no delivery")
    hit("graft.kernel_prepared")
    with marked(shared, fact):
        refusal = run.graft(fact, kernel, lambda commit: shared.stall_for(commit, phase))
    if refusal is not None:
        shared.record(fact.successor(FactKind.CULL, run.step, refusal))
