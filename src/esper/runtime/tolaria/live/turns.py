"""Who may touch the live model: one thread at a time, with the run's own random generators while it does."""

import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager

from esper.runtime.tolaria.device import use_threads
from esper.runtime.tolaria.randomness import RandomState
from esper.runtime.tolaria.randomness import capture_random_state
from esper.runtime.tolaria.randomness import restore_random_state
from esper.runtime.tolaria.store import Beat
from esper.runtime.tolaria.store import Progress

BEAT_SECONDS = 0.5
"""Beats are at least so far apart; a tensor is read for them no more often."""

QUEUE_SECONDS = 900.0
"""So long a wait is beaten while nothing moves; after that it is silent, and its heartbeat times out."""


class Pulse:
    """The beats of one call: gated by time, and told to be silent when a wait has become too long."""

    def __init__(self, beat: Beat, describe: Callable[[str], Progress]) -> None:
        self._beat = beat
        self._describe = describe
        self._next = time.monotonic()
        self.raised: BaseException | None = None
        """What the caller raised to cancel."""

    def __call__(self, phase: str) -> None:
        """Beat if it is time. Raises whatever the caller raises to cancel."""
        if time.monotonic() >= self._next:
            try:
                self._beat(self._describe(phase))
            except BaseException as error:
                self.raised = error
                raise
            self._next = time.monotonic() + BEAT_SECONDS


class Turn:
    """The right to train, judge, commit or export. Waiters are woken whenever something changes.

    `condition` also guards the session's small shared data; it is never held while anything blocks.
    """

    def __init__(self, threads: int, random: RandomState) -> None:
        self.condition = threading.Condition(threading.RLock())
        self.failure: BaseException | None = None
        self._threads = threads
        self._random = random
        self._held = False
        self._moved = time.monotonic()

    @property
    def held(self) -> bool:
        return self._held

    def moved(self) -> None:
        """The run has moved: whoever waits may go on waiting."""
        self._moved = time.monotonic()

    def fail(self, error: BaseException) -> None:
        """The session is at its end: every call raises this from now on."""
        with self.condition:
            self.failure = self.failure or error
            self.condition.notify_all()

    def check(self) -> None:
        """Raise what the session failed with, if it did."""
        if self.failure is not None:
            raise self.failure

    def wait(self, pulse: Callable[[str], None], phase: str) -> None:
        """Wait until something changes, at most half a beat; beat outside the lock. The condition is held by the
        caller once and is held again afterwards."""
        self.condition.wait(BEAT_SECONDS / 2)
        self.condition.release()
        try:
            if time.monotonic() - self._moved < QUEUE_SECONDS:
                pulse(phase)
        finally:
            self.condition.acquire()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Hold the turn that `claim` has taken: the global generators are the run's meanwhile."""
        try:
            use_threads(self._threads)
            restore_random_state(self._random)
            try:
                yield
            finally:
                self._random = capture_random_state()
        finally:
            with self.condition:
                self._held = False
                self.moved()
                self.condition.notify_all()

    def claim(self) -> bool:
        """Take the turn if nobody has it. The caller holds the condition, and enters `taken` next."""
        if self._held:
            return False
        self._held = True
        return True
