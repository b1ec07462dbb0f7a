"""What the threads of one session share, and the ways in which they may wait for each other."""

from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from dataclasses import field
from time import monotonic

from esper.contracts.operational import Fact
from esper.contracts.operational import HeadRef
from esper.errors import LeaseLost
from esper.runtime.tezzeret.build import KernelModule
from esper.runtime.tolaria.live.facts import FactBook
from esper.runtime.tolaria.live.live_run import LiveRun
from esper.runtime.tolaria.live.turns import Turn
from esper.runtime.tolaria.live.writer import Committed
from esper.runtime.tolaria.store import SessionStore

POLL_SECONDS = 0.25

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
    requests: list[Future[HeadRef]] = field(default_factory=list)
    stall_seconds: float = 0.0

    def record(self, fact: Fact) -> Fact:
        """Insert a fact, or find what rules in its place. Called without the lock: it blocks."""
        try:
            recorded = self.store.insert_fact(fact)
        except LeaseLost as error:
            self.turn.fail(error)
            raise
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
        with self.turn.condition:
            self.book.advance_frontier(committed.head.step)
        return committed

    def chosen_step(self) -> int:
        """The first boundary beyond the frontier that training has not come to. The caller holds the lock."""
        return max(self.book.frontier, self.passed, self.run.step - 1) + 1
