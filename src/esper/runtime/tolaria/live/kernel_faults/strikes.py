"""The facts by which a kernel on probation loses a step, or its place: strikes, and the breaker that they open."""

from esper.contracts.enums import FactKind
from esper.contracts.operational import Fact
from esper.runtime.tolaria.live.live_run import LiveRun
from esper.runtime.tolaria.live.run_state import HeldGraft

ALL_STRIKES = 10
"""A kernel that keeps failing now and then is removed too: after so many times `kasmina.strikes` in all."""


def strike_fact(run: LiveRun, graft: Fact, reason: str) -> Fact:
    """The present step is taken without the kernel."""
    return graft.successor(FactKind.STRIKE, run.step, reason)


def breaker_fact(run: LiveRun, graft: Fact, reason: str) -> Fact:
    """From the present step on the kernel is gone. Only where this step's head is yet to be made."""
    return graft.successor(FactKind.BREAKER, run.step, reason)


def breaker_after_strike(run: LiveRun, graft: Fact, reason: str) -> Fact:
    """After the present step, which is taken without it, the kernel is gone: a head of this step may have it still."""
    return graft.successor(FactKind.BREAKER, run.step + 1, reason)


def opened_breaker(run: LiveRun) -> Fact | None:
    """The breaker's fact if the strikes of the kernel on probation open it; a pure function of the run's state."""
    held, limit = run.state.held, run.trainee.plan.config.kasmina.strikes
    if held is None or not (held.strikes >= limit or held.all_strikes >= limit * ALL_STRIKES):
        return None
    return breaker_after_strike(run, held.fact, _counted(held, limit))


def _counted(held: HeldGraft, limit: int) -> str:
    if held.strikes >= limit:
        return f"breaker: its kernel failed {held.strikes} steps in a row"
    return f"breaker: its kernel failed {held.all_strikes} steps"
