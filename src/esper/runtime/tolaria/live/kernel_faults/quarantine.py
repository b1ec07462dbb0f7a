"""Kernels that end their process: a marker around the first executions, and after two crashes no third one."""

from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager

from esper.contracts.enums import FactKind
from esper.contracts.operational import Fact
from esper.errors import LeaseLost
from esper.runtime.tolaria.live.facts import FactBook
from esper.runtime.tolaria.live.run_state import RunState
from esper.runtime.tolaria.live.shared_run import SharedRun
from esper.runtime.tolaria.store import SessionStore

MOST_CRASHES = 2
"""So often may a process end while it executes one kernel for the first time."""


@contextmanager
def marked(shared: SharedRun, graft: Fact) -> Iterator[None]:
    """Inside, the kernel of a graft is executed for the first time. A process that ends here leaves the marker open;
    an error that is raised does not."""
    if graft.delivery is None:
        raise ValueError(f"the graft of {graft.adaptation_id} carries no delivery")
    try:
        shared.store.open_marker(graft.adaptation_id, graft.delivery.kernel)
    except LeaseLost as error:
        shared.turn.fail(error)
        raise
    try:
        yield
    except Exception:
        shared.store.close_marker(graft.adaptation_id)
        raise
    shared.store.close_marker(graft.adaptation_id)


def quarantine(book: FactBook, crashes: Mapping[str, int], state: RunState, step: int, store: SessionStore) -> None:
    """Record a quarantine for every kernel that has ended its process too often, and whose first step is yet to come.

    The run stands at `step`. A graft that is yet to be made never is. One that is in the head stays for its first
    step, which is taken without the kernel, and goes after it.
    """
    for adaptation_id, count in crashes.items():
        graft = book.find(adaptation_id, FactKind.GRAFT)
        if count < MOST_CRASHES or graft is None or graft.apply_step < step:
            continue
        if book.find(adaptation_id, FactKind.QUARANTINE, FactKind.CULL, FactKind.BREAKER) is not None:
            continue
        reason = f"quarantined: the process ended {count} times while it executed the kernel for the first time"
        fact = graft.model_copy(update={"seq": 0, "judge_step": None, "reason": reason})
        apply_step = graft.apply_step
        if state.has_executed(graft):
            strike = fact.model_copy(update={"kind": FactKind.STRIKE, "delivery": None})
            book.record(store.insert_fact(strike))
            apply_step += 1
        changes = {"kind": FactKind.QUARANTINE, "apply_step": apply_step}
        book.record(store.insert_fact(fact.model_copy(update=changes)))


def is_left_out(book: FactBook, graft: Fact) -> bool:
    """Whether a quarantine has come before a graft was made."""
    fact = book.find(graft.adaptation_id, FactKind.QUARANTINE)
    return fact is not None and fact.apply_step == graft.apply_step
