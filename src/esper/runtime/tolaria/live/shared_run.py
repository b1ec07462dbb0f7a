"""What the threads of one session share, and the ways in which they may wait for each other."""

from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from dataclasses import field
from math import ceil
from time import monotonic

from esper.contracts.base import Digest
from esper.contracts.operational import Fact
from esper.errors import EsperError
from esper.runtime.failpoints import hit
from esper.runtime.tezzeret.build import KernelModule
from esper.runtime.tolaria.live.facts import FactBook
from esper.runtime.tolaria.live.kernel_faults.pace import Pace
from esper.runtime.tolaria.live.live_run import LiveRun
from esper.runtime.tolaria.live.turns import Turn
from esper.runtime.tolaria.live.writer import Committed
from esper.runtime.tolaria.store import SessionStore

POLL_SECONDS = 0.25

HEADWAY_SECONDS = 0.1
"""Recording a fact takes less, also on a busy disk: so far ahead of training is a step that is chosen for one."""

Phase = Callable[[str], None]
"""Beats, if it is time, with the name of what is going on."""


@dataclass
class SharedRun:
    """`turn.condition` guards `book`, `prepared`, `requests` and `passed`.

    `passed` is the highest step whose boundary has been left: no fact may be chosen for it or below.
    """

    run: LiveRun
    book: FactBook
    turn: Turn
    store: SessionStore
    passed: int
    prepared: dict[str, KernelModule] = field(default_factory=dict)
    quarantined: frozenset[Digest] = frozenset()
    """Kernels that are never executed again, as they were known when the run was loaded."""
    requests: list[Future[Future[Committed]]] = field(default_factory=list)
    """Who asked for a checkpoint: each is told the commit that holds it."""
    stall_seconds: float = 0.0
    pace: Pace | None = field(default_factory=Pace)
    """How long steps take; none where timings have no say."""
    began: tuple[int, float] | None = None
    """Step and monotonic second at which the last order to train began."""

    def record(self, fact: Fact) -> Fact:
        """Insert a fact, or find what rules in its place. Called without the lock: it blocks.

        A store that fails is the end of the session: the fact may stand, and training must not pass its step.
        """
        hit("fact.before_insert", fact.kind.value)
        try:
            recorded = self.store.insert_fact(fact)
        except EsperError as error:
            self.turn.fail(error)
            raise
        hit("fact.after_insert", fact.kind.value)
        with self.turn.condition:
            self.book.record(recorded)
            self.turn.condition.notify_all()
        return recorded

    def stall_for(self, commit: Future[Committed], phase: Phase) -> Committed:
        """As `await_commit`, on the thread that has the turn: training stands still meanwhile, which is counted."""
        began = monotonic()
        try:
            return self.await_commit(commit, phase)
        finally:
            self.stall_seconds += monotonic() - began

    def await_commit(self, commit: Future[Committed], phase: Phase) -> Committed:
        """Until the commit stands. A commit that fails is the end of the session."""
        while not commit.done():
            wait_for([commit], timeout=POLL_SECONDS)
            if not commit.done():
                phase("committing")
        error = commit.exception()
        if error is not None:
            self.turn.fail(error)
            raise error
        committed = commit.result()
        hit("commit.before_acknowledgement")
        with self.turn.condition:
            self.book.advance_frontier(committed.head.step if committed.report is None else committed.report.step)
        return committed

    def chosen_step(self) -> int:
        """A boundary beyond the frontier that training will come to once a fact for it has been recorded, so that it
        need not wait there; while nothing trains, the next one. The caller holds the lock."""
        return max(self.book.frontier, max(self.passed, self.run.step - 1) + self._headway()) + 1

    def _headway(self) -> int:
        """The steps that training takes in `HEADWAY_SECONDS` at its present pace; half an epoch at most."""
        if self.began is None or not self.turn.held:
            return 0
        step, since = self.began
        pace = (self.run.step - step) / max(1e-9, monotonic() - since)
        most = self.run.trainee.plan.steps_per_epoch // 2
        return max(1, min(most, ceil(HEADWAY_SECONDS * pace)))
